"""openai-agents: plain, streamed, with a tool, with a schema; over chat completions, or what the
argument says.
"""

import sys

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from checks import API_KEY, BASE_URL, CAPITAL, MODEL, PERSON, WEATHER, is_john, is_paris, main
from openai import AsyncOpenAI
from pydantic import BaseModel

set_tracing_disabled(True)
asked = []
is_responses = sys.argv[1:] == ["responses"]
Model = OpenAIResponsesModel if is_responses else OpenAIChatCompletionsModel


class Person(BaseModel):
    name: str
    age: int
    occupation: str


@function_tool
def get_weather(city: str) -> str:
    """Get the current weather of a city"""
    asked.append(city)
    return '{"temperature": 18}'


def agent(**options):
    client = AsyncOpenAI(base_url=BASE_URL, api_key=API_KEY, max_retries=0)
    return Agent(
        name="assistant", model=Model(model=MODEL, openai_client=client),
        model_settings=ModelSettings(temperature=0, max_tokens=100), **options,
    )  # fmt: skip


async def chat():
    is_paris((await Runner.run(agent(), CAPITAL)).final_output)


async def stream():
    result = Runner.run_streamed(agent(), CAPITAL)
    kinds = {event.type async for event in result.stream_events()}
    assert "raw_response_event" in kinds
    is_paris(result.final_output)


async def tools():
    answer = (await Runner.run(agent(tools=[get_weather]), WEATHER)).final_output
    assert asked == ["Paris"] and "18" in answer, (asked, answer)


async def streamed_tools():
    asked.clear()
    result = Runner.run_streamed(agent(tools=[get_weather]), WEATHER)
    async for _ in result.stream_events():
        pass
    assert asked == ["Paris"] and "18" in result.final_output, (asked, result.final_output)


async def go_on():
    first = await Runner.run(agent(), CAPITAL)
    second = await Runner.run(agent(), "Thank you!", previous_response_id=first.last_response_id)
    assert second.final_output


async def structured():
    person = (await Runner.run(agent(output_type=Person), PERSON)).final_output
    is_john(person.name, person.age)


main(chat, stream, tools, streamed_tools, structured, *([go_on] if is_responses else []))
