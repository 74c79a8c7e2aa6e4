"""The search page: a web server over one index.

options.py     what the command line asks for, and the socket it is served at
server.py      opens the index, runs uvicorn, ends it on a signal
app.py         the routes that answer in JSON, and the files of the page
guard.py       what every request passes first: token, host, origin, headers
batching.py    sentences of many requests go through the text tower together
uploads.py     a clip or picture that is searched by: received, decoded in another process
media.py       videos of the index: the file itself in byte ranges, or a clip that a browser can play
jobs.py        processes that decode; worker.py is what they run
"""
