"""LangChain's ChatOpenAI over /v1/responses: plain, streamed, with tools, with a schema."""

from checks import API_KEY, BASE_URL, CAPITAL, MODEL, PERSON, WEATHER, is_john, is_paris, main
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

model = ChatOpenAI(
    base_url=BASE_URL, api_key=API_KEY, model=MODEL, temperature=0, max_tokens=100, max_retries=0,
    use_responses_api=True,
)  # fmt: skip


class Person(BaseModel):
    """The person."""

    name: str
    age: int
    occupation: str


@tool
def get_weather(city: str) -> str:
    """Get the current weather of a city"""
    return f'{{"city": "{city}", "temperature": 18}}'


def plain():
    is_paris(model.invoke(CAPITAL).text)


def stream():
    assert "".join(piece.text for piece in model.stream(CAPITAL)) == model.invoke(CAPITAL).text


def tools():
    with_tools = model.bind_tools([get_weather])
    messages = [HumanMessage(WEATHER)]
    message = with_tools.invoke(messages)
    (call,) = message.tool_calls
    assert (call["name"], call["args"]) == ("get_weather", {"city": "Paris"})
    result = ToolMessage(get_weather.invoke(call["args"]), tool_call_id=call["id"])
    assert "18" in with_tools.invoke([*messages, message, result]).text


def json_schema():
    person = model.with_structured_output(Person, method="json_schema").invoke(PERSON)
    is_john(person.name, person.age)


main(plain, stream, tools, json_schema)
