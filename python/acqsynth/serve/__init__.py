"""The scorer as a service: ``acqsynth serve`` and its client.

The server needs ``fastapi``, ``uvicorn`` and ``prometheus-client``, the client ``httpx``; the extra ``serve`` has all.
"""
