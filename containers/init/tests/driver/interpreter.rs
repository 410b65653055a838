//! A Python that waits for a script, with the machine's own Python: whether the script sees what it
//! would see in a Python that was started for it.

use std::{
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::Command,
};

use bytes::Bytes;
use polydev_proto::init::{
    self, DataAck, Exited, Form, Park, Signal, Start, Stdin, Stream, Variable, agent::State,
    exited, from_init, to_init,
};

use tempfile::TempDir;

use crate::init::{Init, Link, shell};

/// What a script looks at, and its exit status. Each is a script of its own.
const SCRIPTS: &[(&str, &str)] = &[
    (
        "itself",
        "import os, sys\n\
         print(__name__, __file__, __spec__, type(__loader__).__name__, sorted(globals()))\n\
         print(sys.argv, sys.orig_argv, sys.path, os.getcwd(), sys.flags, sys.executable)\n\
         print(os.environb[b'A'], os.environ['USER_ID'], os.environ.get('TRACEPARENT'))",
    ),
    ("status", "import sys\nsys.exit(3)"),
    ("text", "import sys\nsys.exit('a text')"),
    ("nothing", "raise SystemExit"),
    ("error", "def f():\n    1 / 0\nf()"),
    ("syntax", "x = (\n"),
    ("interrupt", "raise KeyboardInterrupt"),
    (
        "sigint",
        "import os, signal\nos.kill(os.getpid(), signal.SIGINT)",
    ),
    ("killed", "import os\nos.kill(os.getpid(), 9)"),
    ("at once", "import os\nos._exit(7)"),
    (
        "thread",
        "import threading, time\n\
         def late():\n    time.sleep(.2)\n    print('late', flush=True)\n\
         threading.Thread(target=late).start()\n\
         print(threading.current_thread() is threading.main_thread(), flush=True)",
    ),
    (
        "daemon",
        "import threading, time\n\
         threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\nprint('over')",
    ),
    (
        "at exit",
        "import atexit\natexit.register(print, 'bye')\nraise ValueError('x')",
    ),
    (
        "stdin",
        "import os, stat, sys\n\
         print(sys.stdin.read().upper(), sys.stdin.name, sys.stdin.mode, sys.stdin.line_buffering)\n\
         print(stat.S_IFMT(os.fstat(0).st_mode))",
    ),
    ("by name", "print(open('/dev/stdin').read())"),
    (
        "child",
        "import subprocess, sys\n\
         print(subprocess.run([sys.executable, '-c', 'print(input())'], capture_output=True, text=True))",
    ),
    (
        "processes",
        "import multiprocessing\n\
         def square(x):\n    return x * x\n\
         if __name__ == '__main__':\n    multiprocessing.set_start_method('spawn')\n\
         \x20   with multiprocessing.Pool(2) as pool:\n        print(pool.map(square, [1, 2, 3]))",
    ),
    (
        "pickled",
        "import pickle\nclass A: pass\nprint(pickle.dumps(A()))",
    ),
    ("latin", "# -*- coding: latin-1 -*-\nprint(ascii('\u{e9}'))"),
    (
        "source",
        "import inspect\ndef f(): pass\nprint(inspect.getsource(f))",
    ),
    ("warning", "import warnings\nwarnings.warn('x')"),
    (
        "descriptors",
        "import os\nprint(sorted(os.listdir('/proc/self/fd')))",
    ),
    (
        "hook",
        "import sys\nsys.excepthook = lambda *a: print('hooked', a[0])\n1 / 0",
    ),
    (
        "future",
        "from __future__ import annotations\ndef f(x: nope): pass\nprint(f.__annotations__)",
    ),
    (
        "signals",
        "import os, signal\n\
         print([(s.name, str(signal.getsignal(s))) for s in signal.valid_signals() if isinstance(s, signal.Signals)])\n\
         print(signal.pthread_sigmask(signal.SIG_BLOCK, []), os.getpgid(0) == os.getpid())",
    ),
    ("neighbour", "import beside\nprint(beside.__file__)"),
    ("yes", "import sys\nsys.exit(True)"),
    ("large", "import sys\nsys.exit(2 ** 40)"),
    ("larger", "import sys\nsys.exit(2 ** 70)"),
    ("negative", "import sys\nsys.exit(-1)"),
    ("list", "import sys\nsys.exit([1])"),
    (
        "unwritten",
        "file = open(1, 'w', closefd=False)\nfile.write('not flushed')",
    ),
    (
        "finalizers",
        "import os\n\
         def helper():\n    return 'a global'\n\
         class A:\n    def __del__(self):\n        print('released', os.sep, helper())\n\
         a = A()\ncircle = [A()]\ncircle.append(circle)",
    ),
    (
        "its module",
        "text = 'class B:\\n    def __del__(self):\\n        print(tell())\\n\
         def tell():\\n    return 1\\nb = B()\\n'\n\
         with open('mine.py', 'w') as file:\n    file.write(text)\nimport mine",
    ),
    (
        "thread's exit",
        "import sys, threading\nthread = threading.Thread(target=sys.exit, args=(3,))\n\
         thread.start()\nthread.join()\nprint('goes on')",
    ),
    (
        "exit at exit",
        "import atexit, sys\nclass Leave:\n    def __call__(self):\n        sys.exit(5)\n    \
         def __repr__(self):\n        return 'without an address'\n\
         atexit.register(print, 'last')\natexit.register(Leave())",
    ),
    (
        "elsewhere",
        "import io, sys\nprint('here')\nsys.stdout = io.StringIO()\nprint('nowhere')",
    ),
    (
        "because",
        "try:\n    1 / 0\nexcept Exception as error:\n    raise ValueError('x') from error",
    ),
    (
        "held",
        "import signal, typing\n\
         class C:\n    pass\n\
         kept = typing.Optional[C]\n\
         signal.signal(signal.SIGTERM, lambda *_: C)\n\
         file = open(1, 'w', closefd=False)\nfile.write('not flushed, and held')",
    ),
    (
        "below",
        "import ctypes\nctypes.CDLL(None).printf(b'by the C library\\n')",
    ),
    (
        "told at its end",
        "import os, signal, sys, threading, time\n\
         signal.signal(signal.SIGTERM, lambda *_: sys.exit(4))\n\
         def late():\n    time.sleep(.1)\n    os.kill(os.getpid(), signal.SIGTERM)\n    time.sleep(.2)\n\
         threading.Thread(target=late).start()",
    ),
    (
        "no text",
        "import sys\nclass C:\n    def __str__(self):\n        raise ValueError('x')\nsys.exit(C())",
    ),
    (
        "no main",
        "import sys\ndel sys.modules['__main__']\nprint('on')",
    ),
    (
        "like a module",
        "import decimal\ndecimal.odd = {'__name__': [], '__builtins__': 1}\nfile = open(1, 'w', closefd=False)\nfile.write('x')",
    ),
    ("group", "raise ExceptionGroup('g', [ValueError(1)])"),
    (
        "async",
        "import asyncio\nasync def main():\n    raise KeyError('x')\nasyncio.run(main())",
    ),
    (
        "hook that fails",
        "import sys\ndef hook(*_):\n    raise ValueError('in the hook')\nsys.excepthook = hook\n1 / 0",
    ),
    (
        "hook that ends",
        "import sys\nsys.excepthook = lambda *_: sys.exit(9)\n1 / 0",
    ),
];

/// An init for which `python` is the machine's Python, and a folder for its script. It is outside of
/// the home, which init clears when it starts something else.
fn started() -> (Init, Link, Work) {
    let folder = tempfile::tempdir().unwrap();
    let bin = folder.path().join("bin");
    fs::create_dir(&bin).unwrap();
    let mut python = Command::new("python3");
    python.args(["-c", "import sys; print(sys.executable)"]);
    let python = String::from_utf8(python.output().unwrap().stdout).unwrap();
    symlink(python.trim(), bin.join("python")).unwrap();
    let init = Init::start_with(|command, _| {
        let path = std::env::var("PATH").unwrap();
        command.env("PATH", format!("{}:{path}", bin.display()));
    });
    let (link, _) = init.connect();
    let path = folder.path().join("work");
    fs::create_dir(&path).unwrap();
    (init, link, Work { path, folder })
}

struct Work {
    path: PathBuf,
    folder: TempDir,
}

impl std::ops::Deref for Work {
    type Target = Path;

    fn deref(&self) -> &Path {
        &self.path
    }
}

/// Has a Python wait in the folder, and returns what becomes of it.
fn park(link: &mut Link, work: &Path, imports: &[&str]) -> init::Agent {
    link.send(to_init::Message::Park(Park {
        provider: "python".into(),
        work_dir: work.to_str().unwrap().into(),
        imports: imports.iter().map(|name| (*name).to_owned()).collect(),
        asks: false,
    }));
    loop {
        match link.next() {
            from_init::Message::Agent(agent) if agent.state() == State::Starting => {}
            from_init::Message::Agent(agent) => return agent,
            other => panic!("{other:?}"),
        }
    }
}

fn script(work: &Path, words: &[&str]) -> Start {
    let argv = ["python"].iter().chain(words);
    let variable = |name: &'static [u8], value: &'static [u8]| Variable {
        name: Bytes::from_static(name),
        value: Bytes::from_static(value),
    };
    Start {
        argv: argv
            .map(|word| Bytes::copy_from_slice(word.as_bytes()))
            .collect(),
        work_dir: work.to_str().unwrap().into(),
        env: vec![variable(b"A", b"\xff1"), variable(b"USER_ID", b"alice")],
        ..shell("")
    }
}

/// What a run shows of itself.
#[derive(Debug, PartialEq)]
struct Shown {
    stdout: String,
    stderr: String,
    status: Option<exited::Status>,
}

fn finish(link: &mut Link) -> (Option<Form>, Shown) {
    let (mut form, mut streams) = (None, [Vec::new(), Vec::new()]);
    loop {
        match link.next() {
            from_init::Message::Started(started) => form = started.form,
            from_init::Message::Data(data) => {
                let is_stderr = data.stream == i32::from(Stream::Stderr);
                streams[usize::from(is_stderr)].extend_from_slice(&data.data);
                let offset = data.offset + data.data.len() as u64;
                link.send(to_init::Message::DataAck(DataAck {
                    stream: data.stream,
                    offset,
                }));
            }
            from_init::Message::Exited(Exited { status, .. }) => {
                let [stdout, stderr] = streams.map(|bytes| String::from_utf8(bytes).unwrap());
                let shown = Shown {
                    stdout,
                    stderr,
                    status,
                };
                return (form, shown);
            }
            _ => {}
        }
    }
}

/// Runs a script in a Python that waits, or in one that is started for it.
fn run(parked: bool, text: &str, stdin: Option<&str>) -> (Option<Form>, Shown) {
    let (_init, mut link, work) = started();
    if parked {
        let agent = park(&mut link, &work, &["json", "decimal"]);
        assert_eq!(agent.state(), State::Ready, "{agent:?}");
    }
    // As bytes: one of them is no UTF-8.
    let bytes: Vec<u8> = match text.contains("latin-1") {
        true => text.chars().map(|letter| letter as u8).collect(),
        false => text.into(),
    };
    fs::write(work.join("script.py"), bytes).unwrap();
    fs::write(work.join("beside.py"), "").unwrap();
    let start = Start {
        stdin: stdin.is_some(),
        ..script(&work, &["./script.py", "one", "-two"])
    };
    link.send(to_init::Message::Start(start.into()));
    if let Some(stdin) = stdin {
        link.send(to_init::Message::Stdin(Stdin {
            offset: 0,
            data: Bytes::copy_from_slice(stdin.as_bytes()),
            close: true,
        }));
    }
    let (form, mut shown) = finish(&mut link);
    // Each run has a folder of its own.
    let folder = work.folder.path().to_str().unwrap();
    for stream in [&mut shown.stdout, &mut shown.stderr] {
        *stream = stream.replace(folder, "FOLDER");
    }
    (form, shown)
}

#[test]
fn a_script_sees_what_it_would_see_in_a_python_of_its_own() {
    for (name, text) in SCRIPTS {
        let reads = ["stdin", "by name", "child"].contains(name);
        let stdin = reads.then_some("in put");
        for stdin in [None, stdin].iter().take(1 + usize::from(reads)).copied() {
            let (form, parked) = run(true, text, stdin);
            assert_eq!(
                form.map(|form| (form.parked, form.reason)),
                Some((true, String::new()))
            );
            let (form, cold) = run(false, text, stdin);
            assert_eq!(form, None);
            assert_eq!(parked, cold, "{name}");
        }
    }
}

#[test]
fn what_a_python_reads_when_it_starts_starts_it_anew() {
    let reason = |prepare: &dyn Fn(&Path), change: &dyn Fn(&mut Start)| {
        let (_init, mut link, work) = started();
        park(&mut link, &work, &["decimal"]);
        fs::write(
            work.join("script.py"),
            "import decimal; print(decimal.__file__)",
        )
        .unwrap();
        prepare(&work);
        let mut start = script(&work, &["script.py"]);
        change(&mut start);
        link.send(to_init::Message::Start(start.into()));
        let (form, shown) = finish(&mut link);
        let form = form.unwrap();
        assert!(!form.parked, "{shown:?}");
        form.reason
    };
    let nothing = |_: &Path| ();
    let unchanged = |_: &mut Start| ();
    assert_eq!(
        reason(
            &|work| fs::write(work.join("decimal.py"), "").unwrap(),
            &unchanged
        ),
        "`decimal` in the script's folder has the name of a module that is imported"
    );
    let package = |work: &Path| {
        fs::create_dir(work.join("decimal")).unwrap();
        fs::write(work.join("decimal/__init__.py"), "").unwrap();
    };
    assert_eq!(
        reason(&package, &unchanged),
        "`decimal` in the script's folder has the name of a module that is imported"
    );
    let path = |start: &mut Start| {
        start.env.push(Variable {
            name: "PYTHONPATH".into(),
            value: "/nowhere".into(),
        });
    };
    assert_eq!(
        reason(&nothing, &path),
        "Python or a library reads `PYTHONPATH` when it starts"
    );
    let no_text = "the script is no file that can be read as text";
    let missing = |start: &mut Start| start.argv[1] = "missing.py".into();
    assert_eq!(reason(&nothing, &missing), no_text);
    let bytecode = |work: &Path| fs::rename(work.join("script.py"), work.join("a.pyc")).unwrap();
    let named = |start: &mut Start| start.argv[1] = "a.pyc".into();
    assert_eq!(reason(&bytecode, &named), no_text);
    // The end of a zip file, which has nothing in it.
    let zip = |work: &Path| {
        let end = [&b"PK\x05\x06"[..], &[0; 18]].concat();
        fs::write(work.join("script.py"), end).unwrap();
    };
    assert_eq!(reason(&zip, &unchanged), no_text);
}

#[test]
fn other_commands_have_a_container_as_if_no_python_had_waited() {
    let (init, mut link, work) = started();
    assert_eq!(park(&mut link, &work, &[]).state(), State::Ready);
    let left = init.folder.path().join("left");
    fs::write(&left, "by the agent").unwrap();
    link.send(to_init::Message::Start(shell("echo a command").into()));
    let (form, shown) = finish(&mut link);
    assert_eq!((form, shown.stdout.as_str()), (None, "a command\n"));
    assert!(!left.exists());
}

#[test]
fn a_module_that_cannot_be_imported_is_the_reason_why_nobody_waits() {
    let (_init, mut link, work) = started();
    let agent = park(&mut link, &work, &["nonesuch"]);
    assert_eq!(agent.state(), State::Gone);
    assert_eq!(
        agent.reason,
        "cannot import `nonesuch`: No module named 'nonesuch'"
    );
}

#[test]
fn a_script_that_is_told_to_end_may_clean_up() {
    let (_init, mut link, work) = started();
    park(&mut link, &work, &[]);
    let text = "import signal, sys, time\n\
                signal.signal(signal.SIGTERM, lambda *_: sys.exit('told'))\n\
                print('ready', flush=True)\ntime.sleep(60)";
    fs::write(work.join("script.py"), text).unwrap();
    fs::set_permissions(work.join("script.py"), fs::Permissions::from_mode(0o400)).unwrap();
    link.send(to_init::Message::Start(
        script(&work, &["script.py"]).into(),
    ));
    let mut form = None;
    loop {
        match link.next() {
            from_init::Message::Started(started) => form = started.form,
            from_init::Message::Data(data) => {
                assert!(data.data.starts_with(b"ready"), "{data:?}");
                break;
            }
            _ => {}
        }
    }
    assert!(form.unwrap().parked);
    link.send(to_init::Message::Signal(Signal { number: 15 }));
    let (_, shown) = finish(&mut link);
    assert_eq!(
        (shown.stderr.as_str(), shown.status),
        ("told\n", Some(exited::Status::Code(1)))
    );
}
