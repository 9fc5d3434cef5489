"""`mimco serve`: the index behind HTTP, and its page. Needs the extra `serve`.

    app.py        FastAPI application: what answers which path
    bodies.py     JSON and forms, read within limits
    schemas.py    what goes in and out
    service.py    what the application does, without HTTP: pictures → embeddings → hits
    batching.py   concurrent pictures share the encoder; a bounded queue
    jobs.py       runs of the indexer
    access.py     who may ask what: host, origin, token; headers of safety
    requests.py   ids, limits, log and metrics of each request
    problems.py   errors as RFC 9457 has them
    metrics.py    what Prometheus reads
    server.py     uvicorn, and how it stops
    web/          the page

One process: requests share one encoder, whose batches are what makes it fast, and one queue, which can only be bounded
where there is one. Decoding is in processes of its own already.
"""
