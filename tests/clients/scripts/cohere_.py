"""Cohere's library against a reranker: both of its clients, which ask /v1/rerank and /v2/rerank."""

import os

import cohere
from checks import API_KEY, MODEL, main

URL = os.environ["PYSERVE_CLIENT_URL"]
DOCUMENTS = ["Paris is the capital of France.", "The sky is blue.", "Cats sleep."]
QUERY = "What is the capital of France?"


def _check(answer, count):
    results = answer.results
    assert len(results) == count, results
    scores = [one.relevance_score for one in results]
    assert scores == sorted(scores, reverse=True) and all(0 <= score <= 1 for score in scores)
    assert {one.index for one in results} <= {0, 1, 2}
    return results


def v2():
    client = cohere.ClientV2(api_key=API_KEY, base_url=URL)
    _check(client.rerank(model=MODEL, query=QUERY, documents=DOCUMENTS), 3)
    answer = client.rerank(
        model=MODEL, query=QUERY, documents=DOCUMENTS, top_n=2, max_tokens_per_doc=4
    )
    _check(answer, 2)


def v1():
    client = cohere.Client(api_key=API_KEY, base_url=URL)
    results = _check(
        client.rerank(model=MODEL, query=QUERY, documents=DOCUMENTS, return_documents=True), 3
    )
    assert [one.document.text for one in results] == [DOCUMENTS[one.index] for one in results]


def refused():
    client = cohere.ClientV2(api_key=API_KEY, base_url=URL)
    try:
        client.rerank(model=MODEL, query=QUERY, documents=[])
    except cohere.errors.BadRequestError as error:
        assert "1 to 2048 documents, got 0" in str(error)
    else:
        raise AssertionError("no documents were taken")


main(v2, v1, refused)
