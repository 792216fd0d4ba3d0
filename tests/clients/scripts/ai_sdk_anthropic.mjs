// Vercel's AI SDK with its provider for Anthropic: text, stream, tools, an object.
import { createAnthropic } from "@ai-sdk/anthropic";
import { Output, generateText, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";
import { API_KEY, BASE_URL, CAPITAL, MODEL, PERSON, WEATHER, contains, equal, main } from "./checks.mjs";

const provider = createAnthropic({ baseURL: BASE_URL, apiKey: API_KEY });
const options = { model: provider(MODEL), temperature: 0, maxOutputTokens: 100, maxRetries: 0 };
const asked = [];
const get_weather = tool({
  description: "Get the current weather of a city",
  inputSchema: z.object({ city: z.string() }),
  execute: async ({ city }) => {
    asked.push(city);
    return { temperature: 18 };
  },
});

await main({
  async chat() {
    contains((await generateText({ ...options, prompt: CAPITAL })).text, "Paris");
  },
  async stream() {
    let text = "";
    for await (const piece of streamText({ ...options, prompt: CAPITAL }).textStream) text += piece;
    contains(text, "Paris");
  },
  async tools() {
    const { text } = await generateText({
      ...options, prompt: WEATHER, tools: { get_weather }, stopWhen: stepCountIs(3),
    });
    equal(asked, ["Paris"]);
    contains(text, "18");
  },
  async object() {
    const schema = z.object({ name: z.string(), age: z.number().int(), occupation: z.string() });
    const { output } = await generateText({
      ...options, prompt: PERSON, output: Output.object({ schema }),
    });
    equal([output.name, output.age], ["John Smith", 30]);
  },
});
