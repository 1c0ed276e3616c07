"""JSON Schemas as pydantic writes them, into pydantic.json: python3 test/golden/json-schema/pydantic_schemas.py"""
import json
import pathlib
import uuid
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum, IntEnum
from ipaddress import IPv4Address, IPv4Network, IPv6Address
from typing import Annotated, Any, Literal, NamedTuple, Optional, Union

from typing_extensions import TypedDict

import pydantic
from pydantic import AnyUrl, Base64Bytes, BaseModel, ConfigDict, Field, HttpUrl, SecretStr, UUID4
from pydantic import conint, conlist, constr


class Color(Enum):
    red = "red"
    green = "green"


class Level(IntEnum):
    low = 1
    high = 2


class Point(NamedTuple):
    x: int
    y: float = 0.0


class Options(TypedDict, total=False):
    verbose: bool
    depth: int


class Address(BaseModel):
    street: str = Field(description="with the number")
    zip: constr(pattern=r"^\d{5}$")
    country: Literal["DE", "FR", "US"] = "DE"


class Person(BaseModel):
    model_config = ConfigDict(extra="forbid", title="A person")
    name: Annotated[str, Field(min_length=1, max_length=40, examples=["Ada"])]
    age: conint(ge=0, lt=150)
    score: Annotated[float, Field(gt=0, le=1)] = 0.5
    nickname: Optional[str] = None
    address: Address
    former: list[Address] = []
    tags: set[str] = set()
    levels: set[Level] = set()
    numbers: frozenset[int] = frozenset()
    favourite: Color | None = None


class Times(BaseModel):
    on: date
    at: datetime
    clock: time
    lasts: timedelta
    id: uuid.UUID
    id4: UUID4


class Net(BaseModel):
    v4: IPv4Address
    v6: IPv6Address
    net: IPv4Network
    url: HttpUrl
    any_url: AnyUrl
    secret: SecretStr
    raw: bytes
    packed: Base64Bytes


class Money(BaseModel):
    amount: Decimal
    cents: Annotated[int, Field(multiple_of=5, ge=0)]
    rate: Annotated[float, Field(multiple_of=0.25, ge=0, le=10)]
    bounded: Annotated[Decimal, Field(max_digits=6, decimal_places=2)]


class Collections(BaseModel):
    mapping: dict[str, int]
    by_color: dict[Color, float]
    by_number: dict[int, str]
    keyed: dict[Annotated[str, Field(pattern="^[a-z]{1,4}$")], bool]
    pair: tuple[int, str]
    many: tuple[float, ...]
    point: Point
    options: Options
    short: conlist(int, min_length=2, max_length=4)
    anything: Any
    json_value: dict[str, Any]


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int = 9


class Dog(BaseModel):
    kind: Literal["dog"]
    good: bool


class Lizard(BaseModel):
    kind: Literal["lizard", "gecko"]
    colour: Color


class Owner(BaseModel):
    pet: Union[Cat, Dog, Lizard] = Field(discriminator="kind")
    other: Union[Cat, Dog, None] = None
    value: Union[int, str, list[int]]


class Node(BaseModel):
    value: int
    left: Optional["Node"] = None
    right: Optional["Node"] = None
    children: list["Node"] = []


class Root(pydantic.RootModel[list[Person]]):
    pass


models = {m.__name__: m for m in [Person, Times, Net, Money, Collections, Owner, Node, Root]}
schemas = {name: model.model_json_schema() for name, model in models.items()}
schemas["Person as it is written"] = Person.model_json_schema(mode="serialization")
schemas["Money as it is written"] = Money.model_json_schema(mode="serialization")
path = pathlib.Path(__file__).with_name("pydantic.json")
path.write_text(json.dumps({"pydantic": pydantic.VERSION, "schemas": schemas}) + "\n")
print(f"pydantic {pydantic.VERSION}: {len(schemas)} schemas")
