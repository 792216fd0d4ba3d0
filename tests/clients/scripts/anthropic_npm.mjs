// The @anthropic-ai/sdk package of npm: plain, streamed, counted, with tools.
import Anthropic from "@anthropic-ai/sdk";
import { API_KEY, CAPITAL, MODEL, WEATHER, contains, equal, main } from "./checks.mjs";

const client = new Anthropic({
  baseURL: process.env.PYSERVE_CLIENT_URL, apiKey: API_KEY, maxRetries: 0,
});
const tool = {
  name: "get_weather",
  description: "Get the current weather of a city",
  input_schema: {
    type: "object",
    properties: { city: { type: "string", description: "Name of the city" } },
    required: ["city"],
  },
};
const body = (content, options = {}) => ({
  model: MODEL, messages: [{ role: "user", content }], temperature: 0, max_tokens: 100, ...options,
});

await main({
  async create() {
    const message = await client.messages.create(body(CAPITAL));
    contains(message.content[0].text, "Paris");
    equal(message.stop_reason, "end_turn");
  },
  async stream() {
    let text = "";
    const events = client.messages.stream(body(CAPITAL)).on("text", (piece) => (text += piece));
    const message = await events.finalMessage();
    equal(text, message.content[0].text);
    contains(text, "Paris");
  },
  async count_tokens() {
    const asked = body(CAPITAL, { tools: [tool] });
    const { usage } = await client.messages.create(asked);
    const { model, messages, tools } = asked;
    const counted = await client.messages.countTokens({ model, messages, tools });
    equal(counted.input_tokens, usage.input_tokens + usage.cache_read_input_tokens);
  },
  async tools() {
    const first = await client.messages.create(body(WEATHER, { tools: [tool] }));
    const call = first.content.at(-1);
    equal([call.name, call.input, first.stop_reason], ["get_weather", { city: "Paris" }, "tool_use"]);
    const result = { type: "tool_result", tool_use_id: call.id, content: '{"temperature": 18}' };
    const messages = [
      { role: "user", content: WEATHER },
      { role: "assistant", content: first.content },
      { role: "user", content: [result] },
    ];
    const last = await client.messages.create(body("", { messages, tools: [tool] }));
    contains(last.content[0].text, "18");
  },
  async tools_stream() {
    const message = await client.messages.stream(body(WEATHER, { tools: [tool] })).finalMessage();
    equal(message.content.at(-1).input, { city: "Paris" });
  },
});
