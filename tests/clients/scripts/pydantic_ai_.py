"""pydantic-ai: an agent with tools, and one with a schema for its answer."""

from checks import API_KEY, BASE_URL, CAPITAL, MODEL, PERSON, WEATHER, is_john, is_paris, main
from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.settings import ModelSettings


class Person(BaseModel):
    """The person."""

    name: str
    age: int
    occupation: str


def agent(**options):
    model = OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=BASE_URL, api_key=API_KEY))
    settings = ModelSettings(temperature=0, max_tokens=100)
    return Agent(model, model_settings=settings, retries=0, **options)


async def chat():
    is_paris((await agent().run(CAPITAL)).output)


async def stream():
    async with agent().run_stream(CAPITAL) as result:
        pieces = [piece async for piece in result.stream_text(delta=True)]
    is_paris("".join(pieces))


async def tools():
    asked = []
    with_tools = agent()

    @with_tools.tool_plain
    def get_weather(city: str) -> dict:
        """Get the current weather of a city"""
        asked.append(city)
        return {"temperature": 18}

    answer = (await with_tools.run(WEATHER)).output
    assert asked == ["Paris"] and "18" in answer, (asked, answer)


async def structured():
    person = (await agent(output_type=NativeOutput(Person)).run(PERSON)).output
    is_john(person.name, person.age)


main(chat, stream, tools, structured)
