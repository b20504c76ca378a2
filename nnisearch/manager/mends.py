"""What is changed of NNI in the tuner's process, each change with its reason.

dispatcher.py loads this without a package: it imports NNI and others' packages, and not nnisearch.
"""

import logging
import os

import websockets
from nni.common import load
from nni.runtime.msg_dispatcher import MsgDispatcher
from nni.runtime.tuner_command_channel import channel, websocket

log = logging.getLogger("nni.mends")  # below nni, whose lines reach dispatcher.log


def apply(connection):
    """Mend NNI before it begins; connection is the socket to its manager."""
    stay_with(connection)
    MsgDispatcher.handle_import_data = handle_import_data


def stay_with(connection):
    """Let NNI talk through this socket only, and end with it.

    NNI connects to a port, and again if the connection is lost. By then the port may be anybody's,
    and what comes from there can run any command.
    """

    async def connect(url):
        # No pings: a pair of sockets is never half dead, and a manager may be stopped for a while.
        given = {"max_size": None, "open_timeout": None, "ping_interval": None}
        return await websockets.connect(url, sock=connection, **given)

    def end(*_):
        log.error("The manager has closed the connection.")
        os._exit(1)  # a thread that is thinking, or is not a daemon, would hold up sys.exit()

    websocket._connect_async = connect
    channel.TunerCommandChannel._retry_send = channel.TunerCommandChannel._retry_receive = end


def handle_import_data(dispatcher, data):
    """Give imported results to the tuner as they are, and let it judge them.

    NNI's method dies of a result without a value, or of text that is no JSON.
    """
    for record in data:
        if isinstance(record, dict) and isinstance(record.get("value"), str):
            try:
                record["value"] = load(record["value"])
            except ValueError:
                continue  # it stays text
    dispatcher.tuner.import_data(data)
