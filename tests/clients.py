"""Runs the clients of exported models quickly, where a test asks for many: `python clients.py SOCKET`.

It imports once what a client imports, and nothing of this project. Each request forks a process that is as fresh as
`python client.py` would be, without the seconds for imports. It ends when its standard input does.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback

PYTHONPATH = os.environ.get("PYTHONPATH")  # as whoever runs the tests has set it
CLIENTS = "LIMBECK_TESTS_CLIENTS"  # the environment's variable that holds the socket


def ask(command: list[str], *, env: dict[str, str], **options: object) -> subprocess.CompletedProcess:
    """As `subprocess.run` of a client's command: [interpreter, script, its arguments].

    An interpreter that is to look elsewhere for packages is started anew.
    """
    if not os.environ.get(CLIENTS) or env.get("PYTHONPATH") != PYTHONPATH:
        return subprocess.run(command, env=env, **options)
    with socket.socket(socket.AF_UNIX) as line, tempfile.NamedTemporaryFile("r") as said:
        deadline = time.monotonic() + 60  # it may be importing yet
        while line.connect_ex(os.environ[CLIENTS]):
            assert time.monotonic() < deadline, "nobody runs clients"
            time.sleep(0.05)
        request = {"argv": command[1:], "environment": env, "cwd": os.getcwd(), "said": said.name}
        line.sendall(json.dumps(request).encode())
        line.shutdown(socket.SHUT_WR)
        code = line.makefile().read()
        return subprocess.CompletedProcess(command, int(code or -1), "", said.read())


def serve(path: str) -> None:
    """Fork a process for each request until nobody can ask any more; the socket is alone in its folder, which goes."""
    import safetensors.torch  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401
    with contextlib.suppress(ImportError):  # of what is optional
        import gguf  # noqa: F401
        import onnxruntime  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for who answers
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen(64)
        while True:
            ready, _, _ = select.select([server, sys.stdin], [], [])
            if sys.stdin in ready:
                os.remove(path)
                os.rmdir(os.path.dirname(path))
                return
            line, _ = server.accept()
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                _answer(line)
            line.close()


def _answer(line: socket.socket) -> None:
    request = json.loads(line.makefile().read())
    child = os.fork()
    if child:
        line.sendall(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])).encode())
        os._exit(0)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    file = os.open(request["said"], os.O_WRONLY)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv[:] = request["argv"]
    sys.path[0] = os.path.dirname(request["argv"][0])
    code = 1
    try:
        runpy.run_path(request["argv"][0], run_name="__main__")
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # to end as an interpreter does takes longer than all else


if __name__ == "__main__":
    serve(sys.argv[1])
