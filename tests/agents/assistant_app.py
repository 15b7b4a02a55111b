"""Agents of pydantic-ai for the tests, as their authors write them; the last lines make them durable."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pydantic
from pydantic_ai import Agent, DeferredToolRequests, ModelRetry
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

import headrace as hr


def note(line: str) -> None:
    """Append a line to the file of ``AGENT_NOTES``; what is written survives any kill of this process."""
    with Path(os.environ["AGENT_NOTES"]).open("a") as out:
        out.write(line + "\n")


def model(name: str, key: str | None = "unused") -> OpenAIChatModel:
    return OpenAIChatModel(name, provider=OpenAIProvider(base_url=os.environ["LLM_URL"], api_key=key))


class Weather(pydantic.BaseModel):
    city: str
    degrees: float


class Advice(pydantic.BaseModel):
    coat: bool
    because: str


forecaster = Agent(model("forecaster"), output_type=Advice, description="Says what to wear.")


@forecaster.tool_plain
def weather(city: str) -> Weather:
    """The weather of a city."""
    note(f"weather {city}")
    return Weather(city=city, degrees=3.5)


traveller = Agent(model("traveller"))


@traveller.tool_plain
async def visit(place: str) -> str:
    """Go somewhere; a place beyond the border takes until the border opens."""
    note(f"begin {place}")
    if place.startswith("beyond"):
        while not Path(os.environ["AGENT_NOTES"]).with_name("open").exists():
            await asyncio.sleep(0.05)
    note(f"end {place}")
    return f"seen {place}"


guesser = Agent(model("guesser"))


@guesser.tool_plain
def guess(number: int) -> str:
    """Guess."""
    note(f"guess {number}")
    if number < 10:
        raise ModelRetry("too small")
    return "right"


cleaner = Agent(model("cleaner"), output_type=[str, DeferredToolRequests])


@cleaner.tool_plain(requires_approval=True)
def erase(path: str) -> str:
    """Erase a file."""
    note(f"erase {path}")
    return "erased"


hr.agent(forecaster, name="forecaster")
hr.agent(traveller, name="traveller")
hr.agent(guesser, name="guesser")
hr.agent(cleaner, name="cleaner")
hr.agent(Agent(model("poet")), name="poet")
hr.agent(Agent(model("mute")), name="mute", stream=False)
# The key of one comes from a variable, as usual; the other one's stands in the code, and looks like no key at all.
hr.agent(Agent(model("keyed", None)), name="keyed")
hr.agent(Agent(model("keyed", "canary_that_stands_in_code")), name="careless")
