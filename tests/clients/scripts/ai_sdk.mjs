// Vercel's AI SDK: text, stream, tools, an object; the argument says by which of its providers.
import { Output, generateText, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";
import { API_KEY, BASE_URL, CAPITAL, MODEL, PERSON, WEATHER, contains, equal, main } from "./checks.mjs";

const server = { baseURL: BASE_URL, apiKey: API_KEY };
const PROVIDERS = {
  async compatible() {
    const { createOpenAICompatible } = await import("@ai-sdk/openai-compatible");
    return createOpenAICompatible({ name: "pyserve", supportsStructuredOutputs: true, ...server });
  },
  async openai() { // which speaks /v1/responses
    return (await import("@ai-sdk/openai")).createOpenAI(server);
  },
  async anthropic() {
    return (await import("@ai-sdk/anthropic")).createAnthropic(server);
  },
};
const provider = await PROVIDERS[process.argv[2]]();
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
