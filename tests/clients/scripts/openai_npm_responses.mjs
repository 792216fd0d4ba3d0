// The openai package of npm on /v1/responses: plain, streamed, parsed with zod, tools, a conversation.
import OpenAI from "openai";
import { zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";
import { API_KEY, BASE_URL, CAPITAL, MODEL, PERSON, WEATHER, contains, equal, main } from "./checks.mjs";

const client = new OpenAI({ baseURL: BASE_URL, apiKey: API_KEY, maxRetries: 0 });
const weatherTool = {
  type: "function",
  name: "get_weather",
  description: "Get the current weather of a city",
  parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
  strict: false,
};
const body = (input, options = {}) => ({
  model: MODEL, input, temperature: 0, max_output_tokens: 100, ...options,
});
const person = z.object({ name: z.string(), age: z.number().int(), occupation: z.string() });

await main({
  async create() {
    contains((await client.responses.create(body(CAPITAL))).output_text, "Paris");
  },
  async stream() {
    let text = "";
    for await (const event of await client.responses.create(body(CAPITAL, { stream: true })))
      if (event.type === "response.output_text.delta") text += event.delta;
    contains(text, "Paris");
  },
  async stream_helper() {
    const runner = client.responses.stream(body(CAPITAL));
    contains((await runner.finalResponse()).output_text, "Paris");
  },
  async tools() {
    const asked = await client.responses.create(body(WEATHER, { tools: [weatherTool] }));
    const [call] = asked.output;
    equal([call.name, JSON.parse(call.arguments)], ["get_weather", { city: "Paris" }]);
    const output = { type: "function_call_output", call_id: call.call_id, output: '{"temperature": 18}' };
    const answer = await client.responses.create(
      body([output], { tools: [weatherTool], previous_response_id: asked.id }),
    );
    contains(answer.output_text, "18");
  },
  async parse() {
    const format = zodTextFormat(person, "person");
    const { output_parsed } = await client.responses.parse(body(PERSON, { text: { format } }));
    equal([output_parsed.name, output_parsed.age], ["John Smith", 30]);
  },
  async background() {
    let response = await client.responses.create(body(CAPITAL, { background: true }));
    while (["queued", "in_progress"].includes(response.status))
      response = await client.responses.retrieve(response.id);
    contains(response.output_text, "Paris");
    await client.responses.delete(response.id);
  },
});
