"""Composition root of the site: a session becomes a Flower `ClientApp` (hops 1 to 6).

The same app runs at a hospital (driven by `node`) and in a simulation (driven by the server's local
grid, which finds this module by name).
"""

from __future__ import annotations

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedward_client.session import SiteSession
from fedward_common.errors import PayloadError
from fedward_common.protocol import read_down, up_content


def client_app(session: SiteSession) -> ClientApp:
    """A Flower app that hands every message to `session`."""
    app = ClientApp()

    def answer(message: Message, _: Context) -> Message:
        try:
            up = session.handle(read_down(message, max_payload=session.max_payload))
        except PayloadError:
            up = None
        # Without an instruction there is nothing to refer to; an empty answer is all that is said.
        return Message(RecordDict() if up is None else up_content(up), reply_to=message)

    app.query()(answer)
    app.train()(answer)
    app.evaluate()(answer)
    return app
