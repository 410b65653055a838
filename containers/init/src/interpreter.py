# Waits for the script of a run, in a Python that has imported what scripts import, and then is the
# script's process. interpreter.rs starts it: its arguments are the names of the modules, stdin is
# the socket for ToAgent and FromAgent of polydev.init.v1, and the environment, the other streams
# and the user are those of a command.
import sys

# Python has imported these before it looks into the script's folder.
STARTED_WITH = frozenset(sys.modules)
MAIN = {name: value for name, value in vars(sys.modules["__main__"]).items() if name != "sys"}

import atexit
import ctypes
import gc
import importlib
import importlib.machinery
import io
import os
import signal
import socket
import stat
import traceback
import types
import zipimport

STREAMS = ()  # Those that the script begins with.

READY, TAKEN, FAILED = 1, 2, 3  # Of FromAgent.
GO, SCRIPT = 2, 3  # Of ToAgent.

# Beginnings of the names of variables that the interpreter, its libraries or the loader have read.
READ_AT_START = (
    "HOME", "LANG", "LC_", "LD_", "MALLOC_", "MKL_", "MPL", "NETWORKX_", "NPY_", "NUMEXPR_", "NUMPY_",
    "OMP_", "OPENBLAS_", "PANDAS_", "PATH", "POLARS_", "PYTHON", "TZ", "XDG_",
)

# Below the driver's own limit, so that the reason names the module.
IMPORT_TIMEOUT = 60


def encoded(number, content=b""):
    """A field of protobuf that has a length."""
    head, size = bytearray([number << 3 | 2]), len(content)
    while size > 127:
        head.append(size & 127 | 128)
        size >>= 7
    head.append(size)
    return bytes(head) + content


def decoded(message):
    """The fields of a message in which each field has a length."""
    at = 0

    def varint():
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7

    while at < len(message):
        number, size = varint() >> 3, varint()
        yield number, message[at : at + size]
        at += size


class Control:
    """The socket to init."""

    def __init__(self):
        self.socket = socket.socket(fileno=os.dup(0))
        self.received = b""
        self.stdin = None

    def say(self, number, reason=""):
        message = encoded(number, encoded(1, reason.encode()) if reason else b"")
        self.socket.sendall(len(message).to_bytes(4, "big") + message)

    def hear(self):
        """The next message: its number and its content. The end of init is the end of this."""
        size = int.from_bytes(self.take(4), "big")
        [(number, content)] = decoded(self.take(size))
        return number, content

    def take(self, count):
        while len(self.received) < count:
            # The script's stdin comes with the script.
            data, descriptors, _, _ = socket.recv_fds(self.socket, 1 << 16, 1)
            if not data:
                os._exit(0)
            self.received += data
            for descriptor in descriptors:
                self.stdin = descriptor
        taken, self.received = self.received[:count], self.received[count:]
        return taken


class Script:
    def __init__(self, message):
        self.argv, self.env, self.work_dir = [], [], b""
        for number, content in decoded(message):
            if number == 1:
                self.argv.append(content)
            elif number == 2:
                pair = dict(decoded(content))
                self.env.append((pair.get(1, b""), pair.get(2, b"")))
            else:
                self.work_dir = content
        self.path = os.path.join(self.work_dir, self.argv[1])
        self.folder = os.path.dirname(os.path.realpath(self.path))

    def reason_to_start_anew(self):
        """Why a Python that starts would do something else, or ""."""
        if not is_text(self.path):
            return "the script is no file that can be read as text"
        for name, _ in self.env:
            if os.fsdecode(name).startswith(READ_AT_START):
                return f"Python or a library reads `{os.fsdecode(name)}` when it starts"
        if "matplotlib" in sys.modules and os.path.exists(os.path.join(self.work_dir, b"matplotlibrc")):
            return "matplotlib reads `matplotlibrc` when it is imported"
        imported = {name.partition(".")[0] for name in sys.modules.keys() - STARTED_WITH}
        for name in sorted(own_modules(self.folder) & imported):
            return f"`{name}` in the script's folder has the name of a module that is imported"
        return ""

    def run(self, stdin):
        """Everything as `python FILE` has it. Returns the exit status, or the signal that ends it."""
        os.dup2(stdin, 0)
        os.close(stdin)
        sys.stdin = sys.__stdin__ = reader(sys.stdin)
        for name, value in self.env:
            os.environb[name] = value
        os.chdir(self.work_dir)
        sys.orig_argv = [os.fsdecode(word) for word in self.argv]
        sys.argv = sys.orig_argv[1:]
        if not sys.flags.safe_path:
            sys.path[0] = os.fsdecode(self.folder)
        # As Python makes it absolute.
        path = self.argv[1]
        if not path.startswith(b"/"):
            path = os.getcwdb() + b"/" + path
        # A module of its own: that of this program has references that nobody can release.
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        name = os.fsdecode(path)
        loader = importlib.machinery.SourceFileLoader("__main__", name)
        vars(main).update(MAIN, __loader__=loader, __file__=name, __cached__=None)
        try:
            run_file(fopen(path, b"rb"), path, FILE_INPUT, vars(main), vars(main), 1, None)
            return 0
        except SystemExit as asked:
            return status_of(asked.code)
        except BaseException as error:
            return show(error)


def show(error):
    """Shows what a script has not caught. Returns the exit status."""
    # Without the frame that has called it.
    error.__traceback__ = error.__traceback__.tb_next
    described = type(error), error, error.__traceback__
    sys.last_type, sys.last_value, sys.last_traceback = described
    sys.last_exc = error
    try:
        sys.excepthook(*described)
    except SystemExit as asked:
        return status_of(asked.code)
    except BaseException as failed:
        failed.__traceback__, failed.__context__ = failed.__traceback__.tb_next, None
        print("Error in sys.excepthook:", file=sys.stderr)
        sys.__excepthook__(type(failed), failed, failed.__traceback__)
        print("\nOriginal exception was:", file=sys.stderr)
        sys.__excepthook__(*described)
    return -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1


def status_of(code):
    """The exit status that `SystemExit(code)` means."""
    if code is None:
        return 0
    if isinstance(code, int):
        return code & 255 if -(2**63) <= code < 2**63 else 255
    try:
        text = str(code)
    except BaseException:
        text = ""  # As Python has it.
    print(text, file=sys.stderr)
    return 1


def end(status):
    """As Python ends, but for the modules that were imported before the script: to release them
    takes three times as long as a script with a plot."""
    if "threading" in sys.modules:
        attempt(sys.modules["threading"], sys.modules["threading"]._shutdown)
    attempt(atexit, atexit._run_exitfuncs)
    if not flush():
        status = 120
    for name in ("last_type", "last_value", "last_exc", "last_traceback"):
        vars(sys).pop(name, None)
    release()
    if not flush():
        status = 120
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


def attempt(of, act):
    """Does a step of the end. What goes wrong is shown and changes nothing, as in Python."""
    try:
        act()
    except BaseException as error:
        unraisable(of, error)


def unraisable(of, error):
    """As sys.unraisablehook shows it, whose argument nobody but Python can make."""
    # Without the frame that has called the step.
    error.__traceback__ = error.__traceback__.tb_next
    try:
        print(f"Exception ignored in: {of!r}", file=sys.stderr)
        traceback.print_exception(error)
    except BaseException:
        pass


def flush():
    """Writes what the streams still have, also those that the script has put aside. Returns whether
    that was possible."""
    all_flushed = True
    for stream in (sys.stdout, sys.stderr, *STREAMS):
        try:
            if stream is not None and not getattr(stream, "closed", False):
                stream.flush()
        except BaseException as error:
            unraisable(stream, error)
            all_flushed = False
    c_library.fflush(None)
    return all_flushed


def release():
    """What the script still has is released: finalizers are called, and open files are written."""
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)) and number != signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
    own = {"__main__", *(name for name in sys.modules if name not in IMPORTED)}
    for name in own:
        sys.modules.pop(name, None)
    gc.collect()
    # Whatever was imported before may still refer to something of the script, and with it to all.
    for names in gc.get_objects():
        if type(names) is dict and "__builtins__" in names and is_any_of(names.get("__name__"), own):
            for name in [*(name for name in names if is_private(name)), *names]:
                if name != "__builtins__":
                    names[name] = None
    gc.collect()
    for file in gc.get_objects():
        try:
            if isinstance(file, io.IOBase) and not file.closed and file.writable():
                file.flush()
        except BaseException:
            pass  # As when Python releases it. It may be anything that says it is a file.


def is_any_of(name, names):
    # A script may have a dict like this, with anything in it.
    return isinstance(name, str) and name in names


def is_private(name):
    return isinstance(name, str) and name.startswith("_") and not name.startswith("__")


def is_text(path):
    """Whether Python would read the file as a script, and not as a package or as bytecode."""
    try:
        # A FIFO would wait for a writer.
        if not stat.S_ISREG(os.stat(path).st_mode) or path.endswith(b".pyc"):
            return False
        with open(path, "rb"):
            pass
        zipimport.zipimporter(os.fsdecode(path))
        return False
    except zipimport.ZipImportError:
        return True
    except (OSError, ValueError):
        return False


def own_modules(folder):
    """The names that an import would find in a folder."""
    suffixes = tuple(importlib.machinery.all_suffixes())
    found = set()
    for entry in os.scandir(os.fsdecode(folder)):
        if entry.is_dir():
            inside = (os.path.join(entry.path, "__init__" + suffix) for suffix in suffixes)
            if any(map(os.path.exists, inside)):
                found.add(entry.name)
        elif entry.name.endswith(suffixes):
            found.add(entry.name.partition(".")[0])
    return found


def reader(former):
    """A new sys.stdin: what a stream does depends on what its descriptor is."""
    binary = io.open(0, "rb", closefd=False)
    binary.raw.name = "<stdin>"
    text = io.TextIOWrapper(binary, former.encoding, former.errors, line_buffering=binary.isatty())
    text.mode = "r"
    return text


c_library = ctypes.CDLL(None)
fopen = c_library.fopen
fopen.argtypes, fopen.restype = [ctypes.c_char_p, ctypes.c_char_p], ctypes.c_void_p
# Python's own function for the text of a file.
run_file = ctypes.pythonapi.PyRun_FileExFlags
run_file.argtypes = [
    ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int, ctypes.py_object, ctypes.py_object, ctypes.c_int,
    ctypes.c_void_p,
]
run_file.restype = ctypes.py_object
FILE_INPUT = 257  # Py_file_input


class silence:
    """What modules print while they are imported is not the script's, and nobody reads it."""

    def __enter__(self):
        self.streams = [os.dup(1), os.dup(2)]
        null = os.open(os.devnull, os.O_WRONLY)
        for descriptor in (1, 2):
            os.dup2(null, descriptor)
        os.close(null)

    def __exit__(self, *_error):
        flush()
        for descriptor, stream in zip((1, 2), self.streams):
            os.dup2(stream, descriptor)
            os.close(stream)


class Late(BaseException):
    """No module should catch it."""


class deadline:
    """Ends what takes too long. It comes again, for modules that catch everything."""

    def __enter__(self):
        def is_late(*_):
            raise Late(f"the modules took more than {IMPORT_TIMEOUT} s")

        self.former = signal.signal(signal.SIGALRM, is_late)
        signal.setitimer(signal.ITIMER_REAL, IMPORT_TIMEOUT, 1)

    def __exit__(self, *_error):
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self.former)


def fail(control, reason):
    control.say(FAILED, reason[:1000])
    os._exit(1)


def wait(names):
    """Imports the modules, and returns the script and its stdin. Ends without one."""
    control = Control()
    with silence(), deadline():
        for name in names:
            try:
                importlib.import_module(name)
            except BaseException as error:
                fail(control, f"cannot import `{name}`: {error}")
    control.say(READY)
    number, content = control.hear()
    if number != SCRIPT:
        fail(control, "it takes only a script")
    try:
        script = Script(content)
        reason = script.reason_to_start_anew()
    except Exception as error:
        reason = f"it cannot look at the script: {error}"
    if reason:
        fail(control, reason)
    control.say(TAKEN)
    control.hear()  # Go.
    control.socket.close()
    return script, control.stdin


script, stdin = wait(sys.argv[1:])
IMPORTED = frozenset(sys.modules)
STREAMS = (sys.stdout, sys.stderr)
# What is there now is not looked through again.
gc.freeze()
status = script.run(stdin)
end(status)
