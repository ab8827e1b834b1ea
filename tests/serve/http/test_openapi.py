"""The OpenAPI document says of requests what the classes say."""

import dataclasses

from jaxinfer import SamplingParams
from jaxinfer.sampling_params import IN_PYTHON_ONLY
from jaxinfer.serve.http.openapi import openapi


def test_document_has_all_sampling_fields_with_range_default_and_meaning():
    document = openapi(title="t", keys=False, defaults=SamplingParams(temperature=0.5))
    properties = document["components"]["schemas"]["SamplingParams"]["properties"]
    names = {entry.name for entry in dataclasses.fields(SamplingParams)}
    assert properties.keys() == names - IN_PYTHON_ONLY - {"structured"}
    temperature, top_p = properties["temperature"], properties["top_p"]
    assert temperature["type"] == "number" and temperature["minimum"] == 0 and temperature["default"] == 0.5
    assert (top_p["exclusiveMinimum"], top_p["maximum"]) == (0, 1)
    assert properties["n"]["maximum"] == 16384 and properties["logprobs"]["maximum"] == 20
    assert all(entry["description"] for entry in properties.values())


def test_document_gives_each_field_one_meaning_and_resolves():
    document = openapi(title="t", keys=True, defaults=SamplingParams())
    schemas = document["components"]["schemas"]
    assert document["security"] and document["paths"]["/api"].keys() == {"put"}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            if "requestBody" not in operation:
                continue
            parts = operation["requestBody"]["content"]["application/json"]["schema"]["allOf"]
            found = [schemas[part["$ref"].rpartition("/")[2]] if "$ref" in part else part for part in parts]
            names = [name for schema in found for name in schema["properties"]]
            assert len(names) == len(set(names)), path
