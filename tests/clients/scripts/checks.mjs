// As checks.py: the server's place, the questions, one line a check.
export const BASE_URL = process.env.PYSERVE_CLIENT_URL + "/v1";
export const MODEL = process.env.PYSERVE_CLIENT_MODEL;
export const API_KEY = "not-needed";
export const CAPITAL = "What is the capital of France?";
export const WEATHER = "What is the weather in Paris?";
export const PERSON = "Extract: John Smith, 30 years old, software engineer";

export function equal(got, wanted) {
  const [a, b] = [JSON.stringify(got), JSON.stringify(wanted)];
  if (a !== b) throw new Error(`got ${a}, wanted ${b}`);
}

export function contains(text, wanted) {
  if (!text?.includes(wanted)) throw new Error(`no ${wanted} in ${JSON.stringify(text)}`);
}

export async function main(functions) {
  for (const [name, check] of Object.entries(functions)) {
    let error = null;
    try {
      await check();
    } catch (problem) {
      console.error(problem);
      error = String(problem).slice(0, 500);
    }
    console.log("CHECK " + JSON.stringify({ name, error }));
  }
}
