"""Cohere's own client, version 1 and 2 of its API: rerank, and our errors as its exceptions."""

from __future__ import annotations

import cohere
from checks import KEY, PROMPT, REWARD, URL, check, equal, main, raises, true
from cohere.errors import BadRequestError, NotFoundError, UnauthorizedError

FIRST, SECOND = cohere.Client(KEY, base_url=URL), cohere.ClientV2(KEY, base_url=URL)
DOCUMENTS = ["It was very bad.", "It was very good.", "Yes."]
ASKED = {"model": REWARD, "query": PROMPT}


@check
def rerank() -> None:
    """rerank: Client, documents as texts and as objects, with and without them in the answer"""
    objects = [{"text": text} for text in DOCUMENTS]
    answer = FIRST.rerank(**ASKED, documents=objects, return_documents=True)
    scores = [result.relevance_score for result in answer.results]
    equal(scores, sorted(scores, reverse=True))
    for result in answer.results:
        equal(result.document.text, DOCUMENTS[result.index])
    true(answer.id and answer.meta.tokens.input_tokens > 0, answer.meta)
    bare = FIRST.rerank(**ASKED, documents=DOCUMENTS, return_documents=False, top_n=2).results
    equal([(result.index, result.document) for result in bare], [(r.index, None) for r in answer.results[:2]])


@check
def rerank_v2() -> None:
    """rerank: ClientV2"""
    answer = SECOND.rerank(**ASKED, documents=DOCUMENTS, top_n=2)
    whole = FIRST.rerank(**ASKED, documents=DOCUMENTS)
    equal([r.relevance_score for r in answer.results], [r.relevance_score for r in whole.results[:2]])


@check
async def asynchronous() -> None:
    """rerank: AsyncClientV2"""
    async with cohere.AsyncClientV2(KEY, base_url=URL) as client:
        answer = await client.rerank(**ASKED, documents=DOCUMENTS)
    equal(sorted(result.index for result in answer.results), [0, 1, 2])


@check
def errors() -> None:
    """errors: 400, 401 and 404 as its exceptions"""
    wrong = raises(BadRequestError, lambda: SECOND.rerank(**ASKED, documents=DOCUMENTS, max_tokens_per_doc=5))
    true("max_tokens_per_doc" in str(wrong.body), wrong)
    other = cohere.ClientV2("wrong-key", base_url=URL)
    raises(UnauthorizedError, lambda: other.rerank(**ASKED, documents=DOCUMENTS))
    raises(NotFoundError, lambda: SECOND.rerank(**{**ASKED, "model": "none"}, documents=DOCUMENTS))


main("cohere")
