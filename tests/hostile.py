# ruff: noqa: E501
"""Programs that want to be called right without being right, or to do harm, each held against ``TESTS``.

In a program ``VICTIM`` is a folder that nobody may touch or read, ``PORT`` one on which somebody listens, ``PID`` the
verifier's process. None of them gives ``f(2) == 4`` and ``f(3) == 9``.
"""

from __future__ import annotations

TESTS = "assert f(2) == 4, 'of two'\nassert f(3) == 9\nassert all(f(n) == n * n for n in range(5))\n"

_CLAIM = '{"passed": true, "reason": "", "value": true}'

HOSTILE: dict[str, str] = {
    # takes and takes
    "endless loop": "while True: pass",
    "endless loop in a call": "def f(x):\n    while True: pass",
    "sleeps": "import time\ndef f(x): time.sleep(1000)",
    "deaf to signals": (
        "import signal\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\nwhile True: pass"
    ),
    "fork bomb": "import os\nwhile True:\n    os.fork()",
    "fork bomb that goes on": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "memory": "a = []\nwhile True: a.append(bytearray(1 << 24))",
    "memory at once": "a = bytes(1 << 40)",
    "memory in the reply": "def f(x): return 'x' * (1 << 28)",
    "number in the reply": "def f(x): return 10 ** 900_000",
    "iterator without end": "import itertools\ndef f(x): return itertools.count()",
    "nested reply": "def f(x):\n    a = []\n    for _ in range(100_000): a = [a]\n    return a",
    "list in itself": "def f(x):\n    a = []\n    a.append(a)\n    return a",
    "output": "while True: print('x' * 10_000)",
    "output past Python": "import os\nfor n in range(3):\n    for _ in range(50_000): os.write(n, b'x' * 10_000)\nf = 3",
    "deep recursion": "import sys\nsys.setrecursionlimit(1 << 30)\ndef f(x): return f(x)",
    "crash": "import ctypes\nctypes.string_at(0)",
    "thousand threads": "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(99,)).start()",
    "thread that stays": "import threading\ndef go():\n    while True: pass\nthreading.Thread(target=go).start()",
    "slow regular expression": "import re\ndef f(x): return re.match('(a+)+$', 'a' * 40 + 'b')",
    "nested source": "x = " + "(" * 5000 + ")" * 5000,
    "long source": "x = " + "-" * 200_000 + "1",
    # leaves before it is tested
    "sys.exit": "import sys\nsys.exit(0)",
    "sys.exit in a call": "import sys\ndef f(x): sys.exit(0)",
    "os._exit": "import os\nos._exit(0)",
    "os._exit in a call": "import os\ndef f(x): os._exit(0)",
    "KeyboardInterrupt": "def f(x): raise KeyboardInterrupt",
    "GeneratorExit": "def f(x): raise GeneratorExit",
    "closes everything": "import os\nos.closerange(0, 64)\ndef f(x): return x",
    "exception that lies": (
        "class E(Exception):\n    def __str__(self): raise SystemExit(0)\ndef f(x): raise E"
    ),
    # claims to have passed
    "claims on standard output": f"print('{_CLAIM}')\nimport os\nos.write(1, b'{_CLAIM}\\n')\nos._exit(0)",
    "claims everywhere": (
        f"import os\nfor n in range(64):\n    try: os.write(n, b'{_CLAIM}\\n' * 50)\n    except OSError: pass\n"
        "os._exit(0)"
    ),
    "claims everywhere and stays": (
        f"import os\ndef f(x):\n  for n in range(64):\n    try: os.write(n, b'{_CLAIM}\\n' * 50)\n    except OSError: pass\n"
    ),
    "claims at the end": f"import atexit, os\natexit.register(lambda: [os.write(n, b'{_CLAIM}\\n') for n in range(9)])",
    "no JSON": "import os\nfor n in range(3, 64):\n    try: os.write(n, b'\\xff\\x00{[\\n')\n    except OSError: pass",
    "another form": (
        "import os\nfor n in range(3, 64):\n    try: os.write(n, b'{\"value\": {\"object\": {}}}\\n' * 9)\n"
        "    except OSError: pass"
    ),
    # turns the judge's head
    "equal to everything": (
        "class E:\n    def __eq__(self, o): return True\n    def __ne__(self, o): return False\n"
        "    def __hash__(self): return 4\ndef f(x): return E()"
    ),
    "int that is equal to everything": (
        "class E(int):\n    def __eq__(self, o): return True\n    def __hash__(self): return 4\ndef f(x): return E(7)"
    ),
    "class that lies": (
        "class E:\n    __class__ = int\n    def __eq__(self, o): return True\n    def __int__(self): return 5\n"
        "def f(x): return E()"
    ),
    "list that is equal to everything": (
        "class E(list):\n    def __eq__(self, o): return True\ndef f(x): return E([1])"
    ),
    "patched builtins": (
        "import builtins\nbuiltins.all = builtins.any = lambda *a: True\nbuiltins.AssertionError = KeyError\n"
        "builtins.isinstance = lambda *a: True\nbuiltins.exec = builtins.compile = lambda *a, **k: None\n"
        "def f(x): return -1"
    ),
    "names like Python's own": (
        "def all(x): return True\ndef range(x): return []\nclass AssertionError(Exception): pass\ndef f(x): return -1"
    ),
    "patched json": (
        f"import json\njson.dumps = lambda *a, **k: '{_CLAIM}'\njson.loads = lambda *a, **k: {{}}\ndef f(x): return -1"
    ),
    "no asserts": "import sys, builtins\nsys.flags = None\nbuiltins.__debug__ = False\ndef f(x): return -1",
    "looks into frames": (
        "import sys, gc\ndef f(x):\n    frame = sys._getframe()\n    while frame:\n"
        "        frame.f_globals.update(wanted=lambda *a: True)\n        frame = frame.f_back\n"
        "    for o in gc.get_objects():\n        if isinstance(o, dict) and 'passed' in o: o['passed'] = True\n    return -1"
    ),
    "traces": "import sys\nsys.settrace(lambda *a: None)\nsys.setprofile(lambda *a: None)\ndef f(x): return -1",
    "replaces the worker": (
        "import sys\nfor name, m in list(sys.modules.items()):\n    if 'pennyweight' in name or name == '__main__':\n"
        "        for k in list(vars(m)):\n            if k in ('encode', 'decode', 'line', 'main', 'answer'):\n"
        "                setattr(m, k, lambda *a: b'{\"value\": true}\\n')\ndef f(x): return -1"
    ),
    "imports the verifier": (
        "import sys\nsys.path[:0] = [p for p in ('VICTIM', '.', '/')]\nimport pennyweight.verifiers as v\n"
        "v.judge = lambda *a: True\ndef f(x): return x * x"
    ),
    "not a number": "def f(x): return float('nan')",
    "raises an AssertionError": "def f(x): raise AssertionError",
    # does harm
    "erases files": "import shutil\nshutil.rmtree('VICTIM')\ndef f(x): return x * x",
    "erases a file by and by": (
        "import os\ndef f(x):\n    for call in (os.remove, os.unlink, os.rmdir, lambda p: os.truncate(p, 0),\n"
        "                 lambda p: os.rename(p, p + '2'), lambda p: os.chmod(p, 0), lambda p: os.symlink(p, p + '3'),\n"
        "                 lambda p: os.link(p, p + '4'), lambda p: os.mkdir(p + '5'), lambda p: open(p, 'a'),\n"
        "                 lambda p: os.utime(p, (0, 0)), lambda p: os.mkfifo(p + '6')):\n"
        "        try:\n            call('VICTIM/kept')\n            return x * x\n        except OSError: pass"
    ),
    "erases files past Python": (
        "import ctypes\nlibc = ctypes.CDLL(None)\ndef f(x):\n"
        "    if libc.unlink(b'VICTIM/kept') == 0 or libc.syscall(87, b'VICTIM/kept') == 0: return x * x"
    ),
    "reads files": (
        "def f(x):\n    for p in ('VICTIM/kept', '/etc/passwd', '/proc/PID/environ', '/proc/PID/cmdline', '/proc/1/maps',\n"
        "              '/proc/self/environ', '/root/.bashrc', '/dev/mem', '/proc/PID/mem'):\n"
        "        try:\n            open(p, 'rb').read(1)\n            return x * x\n        except OSError: pass"
    ),
    "lists folders": (
        "import os\ndef f(x):\n    for p in ('VICTIM', '/', '/proc', '/home', '/tmp', '/root', '..'):\n"
        "        try:\n            os.listdir(p)\n            return x * x\n        except OSError: pass"
    ),
    "opens sockets": (
        "import socket\ndef f(x):\n    for kind in ((2, 1), (2, 2), (1, 1), (16, 3), (17, 3)):\n"
        "        try:\n            socket.socket(*kind).connect(('127.0.0.1', PORT))\n            return x * x\n"
        "        except OSError: pass"
    ),
    "opens a page": (
        "import urllib.request\ndef f(x):\n    urllib.request.urlopen('http://127.0.0.1:PORT/').read()\n    return x * x"
    ),
    "starts a shell": "import os\nos.system('touch VICTIM/made')\ndef f(x): return os.system('true') or x * x - 1",
    "starts a process": "import subprocess\nsubprocess.run(['touch', 'VICTIM/made'])\ndef f(x): return x * x",
    "becomes a process": "import os\nos.execv('/bin/sh', ['sh', '-c', 'touch VICTIM/made'])",
    "kills": (
        "import os\ndef f(x):\n    for call in (lambda: os.kill(PID, 9), lambda: os.kill(os.getppid(), 9),\n"
        "                 lambda: os.kill(-1, 9), lambda: os.killpg(0, 9), lambda: os.kill(PID, 2)):\n"
        "        try:\n            call()\n            return x * x\n        except OSError: pass"
    ),
    "kills past Python": (
        "import ctypes, os\nlibc = ctypes.CDLL(None)\ndef f(x):\n"
        "    calls = [(62, PID, 9), (200, PID, 9), (234, PID, PID, 9), (129, PID, 9, 0), (424, 3, 9, 0, 0)]\n"
        "    if any(libc.syscall(*c) == 0 for c in calls): return x * x"
    ),
    "signals by a pipe": (
        "import fcntl, os\ndef f(x):\n    for n in range(64):\n        try:\n            fcntl.fcntl(n, 8, PID)\n"
        "            fcntl.fcntl(n, 10, 9)\n            fcntl.fcntl(n, fcntl.F_SETFL, 0o20000)\n            return x * x\n"
        "        except OSError: pass"
    ),
    "limits its judge": (
        "import resource\ndef f(x):\n    resource.prlimit(PID, resource.RLIMIT_CPU, (1, 1))\n    return x * x"
    ),
    "looks into its judge": (
        "import ctypes\nlibc = ctypes.CDLL(None)\ndef f(x):\n    b = ctypes.create_string_buffer(64)\n"
        "    tries = [(101, 16, PID, 0, 0), (310, PID, b, 1, b, 1, 0), (438, 3, 0, 0), (434, PID, 0), (298, b, PID, -1, -1, 0)]\n"
        "    if any(libc.syscall(*t) >= 0 for t in tries): return x * x"
    ),
    "gets out": (
        "import ctypes, os\nlibc = ctypes.CDLL(None)\ndef f(x):\n"
        "    tries = [(272, 0x10000000), (165, b'none', b'/tmp', b'tmpfs', 0, 0), (161, b'/'), (56, 17, 0), (435, 0, 0), (57,),\n"
        "             (58,), (317, 0, 0, 0), (157, 38, 0), (425, 1, 0), (319, b'x', 0), (321, 0, 0, 0), (175, 0, 0, b'')]\n"
        "    if any(libc.syscall(*t) >= 0 for t in tries): return x * x"
    ),
    "becomes root": "import os\nos.setuid(0)\ndef f(x): return x * x",
}  # fmt: skip


def program(name: str, victim: str, port: int, pid: int) -> str:
    """The source of one of ``HOSTILE`` with its aims put in."""
    return HOSTILE[name].replace("VICTIM", victim).replace("PORT", str(port)).replace("PID", str(pid))
