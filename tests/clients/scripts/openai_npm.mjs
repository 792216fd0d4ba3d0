// The openai package of npm: plain, streamed, parsed with zod, with tools.
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";
import { API_KEY, BASE_URL, CAPITAL, MODEL, PERSON, WEATHER, contains, equal, main } from "./checks.mjs";

const client = new OpenAI({ baseURL: BASE_URL, apiKey: API_KEY, maxRetries: 0 });
const weatherTool = {
  type: "function",
  function: {
    name: "get_weather",
    description: "Get the current weather of a city",
    parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
  },
};
const body = (content, options = {}) => ({
  model: MODEL, messages: [{ role: "user", content }], temperature: 0, max_tokens: 100, ...options,
});

await main({
  async chat() {
    const response = await client.chat.completions.create(body(CAPITAL));
    contains(response.choices[0].message.content, "Paris");
  },
  async stream() {
    let text = "";
    for await (const frame of await client.chat.completions.create(body(CAPITAL, { stream: true })))
      text += frame.choices[0]?.delta?.content ?? "";
    contains(text, "Paris");
  },
  async stream_helper() {
    const runner = client.chat.completions.stream(body(CAPITAL));
    contains((await runner.finalChatCompletion()).choices[0].message.content, "Paris");
  },
  async tools() {
    const response = await client.chat.completions.create(body(WEATHER, { tools: [weatherTool] }));
    const [call] = response.choices[0].message.tool_calls;
    equal(call.function.name, "get_weather");
    equal(JSON.parse(call.function.arguments), { city: "Paris" });
  },
  async parse() {
    const person = z.object({ name: z.string(), age: z.number().int(), occupation: z.string() });
    const response = await client.chat.completions.parse(
      body(PERSON, { response_format: zodResponseFormat(person, "person") }),
    );
    const { name, age } = response.choices[0].message.parsed;
    equal([name, age], ["John Smith", 30]);
  },
});
