"""What goes in and out of the service, as JSON. OpenAPI is made from these.

A picture of the index is named by its `id`, the SHA-256 of its content: it outlives rebuilds, never means another
picture, and says nothing about the machine. Copies share it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from mimco_deploy.serving import MAX_WEIGHT

MAX_PARTS = 8
"""Pictures in one query."""
MAX_QUERIES = 32
"""In one request."""
MAX_K = 1000
MAX_RERANKED_K = 48
JobState = Literal["running", "cancelling", "done", "failed", "cancelled"]
UNDER_WAY: tuple[JobState, ...] = ("running", "cancelling")

PictureId = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$", description="SHA-256 of the content, hexadecimal")]
Text = Annotated[str, Field(max_length=4096, pattern=r"^[^\x00]*$")]
Share = Annotated[float, Field(ge=0, le=1)]


class Request(BaseModel):
    """Refuses what it does not know: a mistyped name must not be a silent default."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class QueryPart(Request):
    """One picture of a query: an uploaded one, or one of the index by `id` or `path`."""

    upload: int | None = Field(None, ge=0, lt=MAX_PARTS * MAX_QUERIES, description="Number of a `file` of the form")
    id: PictureId | None = None
    path: Text | None = Field(None, description="Absolute path of an indexed file; only looked up")
    weight: float = Field(1.0, ge=-MAX_WEIGHT, le=MAX_WEIGHT, description="Below 0: unlike this picture")
    crop: tuple[Share, Share, Share, Share] | None = Field(
        None, description="Left, top, width, height as shares of the upright picture"
    )


class Query(Request):
    """What is searched for. Without `parts`, all files of the form together."""

    parts: list[QueryPart] | None = Field(None, min_length=1, max_length=MAX_PARTS)
    k: int = Field(24, ge=1, le=MAX_K, description="Most hits")
    where: Text = Field("", description="Condition on the hits, in the words of SQL: docs/search.md")
    root: Text | None = Field(None, description="Only pictures in this folder or below")
    min_score: float = Field(-1.0, ge=-1, le=1)
    min_confidence: Share = 0.0
    rerank: bool = Field(
        False, strict=True, description="Order the best hits by how alike their parts are to the first picture's"
    )


class Batch(Request):
    """Several queries at once."""

    queries: list[Query] = Field(min_length=1, max_length=MAX_QUERIES)


class WhyRequest(Request):
    """Two pictures to compare part by part."""

    query: QueryPart
    hit: PictureId


class Hit(BaseModel):
    """One file that a search found."""

    id: PictureId
    path: str
    score: float = Field(description="Cosine in [−1, 1]: 1 is the same picture")
    expected_by_chance: float | None = Field(description="Pictures of the index that would score this by chance")
    confidence: float | None = Field(description="1 / (1 + expected by chance); null where there are too few to tell")
    confidence_word: str = Field(description="clear, likely, unsure or chance; empty where there is no confidence")


class Answer(BaseModel):
    """What a search found."""

    hits: list[Hit]
    searched: int = Field(description="Different pictures of the index")
    timings_ms: dict[str, float] = Field(description="decode, wait, embed, search, rerank")


class Answers(BaseModel):
    """What several searches found, in the order of the queries."""

    answers: list[Answer]


class Embeddings(BaseModel):
    """Embeddings of the uploaded pictures, in their order."""

    fingerprint: str = Field(description="Of the encoder")
    embedding_dim: int
    embeddings: list[list[float]]


class SeenPart(BaseModel):
    """A picture as the encoder saw it."""

    box: tuple[float, float, float, float] = Field(
        description="Of the upright picture: left, top, width, height, shares"
    )
    heat: list[list[float]] = Field(description="Rows of the patch grid: highest cosine with any part of the other")


class Why(BaseModel):
    """Where two pictures are alike."""

    score: float = Field(description="How alike by parts, in [−1, 1]")
    query: SeenPart
    hit: SeenPart


class Picture(BaseModel):
    """One content of the index."""

    id: PictureId
    paths: list[str] = Field(description="Absolute; more than one where there are copies")
    bytes: int
    modified: str = Field(description="UTC, ISO 8601")
    width_px: int | None
    height_px: int | None
    taken: str | None = Field(description="By the camera's clock")
    camera: str | None


class PicturePage(BaseModel):
    """Some pictures of the index, by folder and name."""

    pictures: list[Picture]
    next: str | None = Field(description="Give it as `after` for those that follow; null at the end")


class Folder(BaseModel):
    """One indexed folder."""

    path: str
    reachable: bool
    files: int
    problems: int


class IndexStatus(BaseModel):
    """What the index holds, and how it is searched."""

    fingerprint: str
    embedding_dim: int
    generation: int
    revision: int = Field(description="Grows with each change")
    files: int
    contents: int
    problems: int
    bytes: int
    roots: list[Folder]
    search: dict[str, Any] = Field(description="kind (flat or an approximation) and its measured recall")
    writer: int | None = Field(description="Process that is writing to it, which may be this one")
    patches: bool = Field(description="Whether the encoder gives patch tokens, which /v1/why and rerank need")
    columns: dict[str, str] = Field(description="What `where` may name")
    max_upload_bytes: int = Field(description="Of one request with pictures")


class Problem(BaseModel):
    """One file that could not be indexed."""

    path: str
    problem: str = Field(description="Reason class")
    found: str


class ProblemPage(BaseModel):
    """Some of the files that could not be indexed, by path."""

    problems: list[Problem]
    total: int
    next: str | None


class DuplicateFile(BaseModel):
    """One file of a group."""

    id: PictureId
    path: str
    kind: Literal["kept", "copy", "near", "same file"]
    score: float = Field(description="Cosine with the kept one")


class DuplicateGroup(BaseModel):
    """Files that show the same picture; the first is the best one."""

    files: list[DuplicateFile]


class Duplicates(BaseModel):
    """Groups of copies and near duplicates."""

    groups: list[DuplicateGroup]
    total: int = Field(description="Groups in all")


class MapPoints(BaseModel):
    """The collection on a plane; alike pictures lie close."""

    method: Literal["pca", "umap"]
    ids: list[str]
    x: list[float] = Field(description="In [0, 1], as is y")
    y: list[float]


class Job(BaseModel):
    """One run of the indexer."""

    id: str
    state: JobState
    done: int
    total: int
    images_per_s: float
    waiting: float = Field(description="Share of time the encoder waited for pictures")
    doing: str
    started: str = Field(description="UTC, ISO 8601")
    report: dict[str, int] | None = Field(
        description="added, changed, removed, unchanged, embedded, problems; folders that were unreachable; at the end"
    )
    error: str | None


class JobRequest(Request):
    """What to index: the folders that the index knows, all or one of them."""

    root: Text | None = Field(None, description="One of the indexed folders; all where null")
    retry_problems: bool = Field(False, strict=True)


class Version(BaseModel):
    """What is running."""

    version: str
    fingerprint: str
    embedding_dim: int
    precision: str
    provider: str = Field(description="What really runs the encoder")
    index_generation: int


class Health(BaseModel):
    """Whether the process lives, or can answer."""

    status: Literal["ok"]


class ProblemDetails(BaseModel):
    """An error, as RFC 9457 has it (application/problem+json)."""

    type: str = Field(description="`about:blank` or `urn:mimco:` and the kind of error")
    title: str
    status: int
    detail: str
    instance: str = Field(description="Id of the request, as in the log")
