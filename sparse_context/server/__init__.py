"""`sparse-context serve`: one pipeline behind HTTP, as the official `openai` client calls it.

settings.py   what the operator decides: bounds, defaults, the key
guard.py      around everything: key, host, bytes, slow senders, one log line a request
fields.py     what a form or a JSON body says, as plain values; schema.py has the fields and the OpenAPI page
wanted.py     from fields to what to make and how to send it
uploads.py    pictures that were sent: bounds, masks, digests
jobs.py       one thing to make, and all who wait for it
worker.py     the thread that makes things, and the queue before it
replies.py    JSON and event streams
metrics.py    what Prometheus reads
app.py        the routes; run.py puts them behind a port
on_ray.py     the same front, with replicas of the pipeline that Ray keeps alive
"""

KEY_VARIABLE = "SPARSE_CONTEXT_API_KEY"  # of the environment
