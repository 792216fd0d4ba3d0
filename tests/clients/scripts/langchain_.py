"""LangChain: plain, streamed, with tools, with a schema; the argument says by which client."""

import os
import sys

from checks import API_KEY, BASE_URL, CAPITAL, MODEL, PERSON, WEATHER, is_john, is_paris, main
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from pydantic import BaseModel


def make_model(client):
    options = {"api_key": API_KEY, "model": MODEL, "temperature": 0, "max_tokens": 100}
    if client == "anthropic":
        from langchain_anthropic import ChatAnthropic

        url = os.environ["PYSERVE_CLIENT_URL"]
        return ChatAnthropic(base_url=url, max_retries=0, **options)
    from langchain_openai import ChatOpenAI

    is_responses = client == "responses"
    return ChatOpenAI(base_url=BASE_URL, max_retries=0, use_responses_api=is_responses, **options)


model = make_model(sys.argv[1])


class Person(BaseModel):
    """The person."""

    name: str
    age: int
    occupation: str


@tool
def get_weather(city: str) -> str:
    """Get the current weather of a city"""
    return f'{{"city": "{city}", "temperature": 18}}'


def chat():
    is_paris(model.invoke(CAPITAL).text)


def stream():
    assert "".join(piece.text for piece in model.stream(CAPITAL)) == model.invoke(CAPITAL).text


async def chat_async():
    is_paris((await model.ainvoke(CAPITAL)).text)


def tools():
    with_tools = model.bind_tools([get_weather])
    messages = [HumanMessage(WEATHER)]
    message = with_tools.invoke(messages)
    (call,) = message.tool_calls
    assert (call["name"], call["args"]) == ("get_weather", {"city": "Paris"})
    result = ToolMessage(get_weather.invoke(call["args"]), tool_call_id=call["id"])
    assert "18" in with_tools.invoke([*messages, message, result]).text


def extract(method):
    person = model.with_structured_output(Person, method=method).invoke(PERSON)
    is_john(person.name, person.age)


def json_schema():
    extract("json_schema")


def function_calling():
    extract("function_calling")


main(chat, stream, chat_async, tools, json_schema, function_calling)
