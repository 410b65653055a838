use std::{
    fs,
    path::{Path, PathBuf},
    time::Instant,
};

use nix::sys::{
    resource::{Resource, getrlimit, setrlimit},
    signal::{SigSet, Signal},
};
use polydev_transport::connection::Origin;
use proptest::prelude::*;
use tempfile::TempDir;

use super::{
    Error,
    chain::{Entry, Key, Line},
    log::{Log, MAX_FILE},
    ocsf,
    reader::{self, Broken, End, Why},
    record::{Operation, Record},
};
use crate::access::Caller;

fn key() -> Key {
    Key::new(&[7; 32])
}

fn caller() -> Caller {
    Caller {
        name: "cn:controller".into(),
        user: None,
        origin: Origin::Address("127.0.0.1:4711".parse().unwrap()),
    }
}

fn record(user_id: &str) -> Record {
    let record = Record::new(&caller(), Operation::Start).user(user_id);
    record.run("0199").provider("anthropic")
}

/// A log with these users' records.
fn written(users: &[&str]) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let log = Log::open(folder.path(), key()).unwrap();
    for user_id in users {
        log.write(&record(user_id)).unwrap();
    }
    folder
}

fn verify(folder: &Path) -> Result<End, Error> {
    let end = reader::read(folder, &key(), usize::MAX, drop)?;
    Ok(end.expect("it has lines"))
}

fn only(folder: &Path) -> PathBuf {
    reader::path(folder, 1)
}

/// Changes the lines of the only file.
fn change(folder: &Path, change: impl FnOnce(&mut Vec<String>)) {
    let text = fs::read_to_string(only(folder)).unwrap();
    let mut lines = text.lines().map(str::to_owned).collect();
    change(&mut lines);
    fs::write(only(folder), lines.join("\n") + "\n").unwrap();
}

#[track_caller]
fn is_broken(folder: &Path, line: u64, why: Why) {
    match verify(folder) {
        Err(Error::Broken(broken)) => assert_eq!((broken.line, broken.why), (line, why)),
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_edit_a_removal_another_order_and_a_cut_end_are_found_with_their_place() {
    let users = ["alice", "bob", "carol", "dave"];
    let log = || written(&users);
    assert_eq!(verify(log().path()).unwrap().last, 5);

    let edited = log();
    change(edited.path(), |lines| {
        lines[2] = lines[2].replace("bob", "eve")
    });
    is_broken(edited.path(), 3, Why::Changed { number: 3 });

    let removed = log();
    change(removed.path(), |lines| drop(lines.remove(2)));
    is_broken(
        removed.path(),
        3,
        Why::Place {
            expected: 3,
            found: 4,
        },
    );

    let moved = log();
    change(moved.path(), |lines| lines.swap(2, 3));
    is_broken(
        moved.path(),
        3,
        Why::Place {
            expected: 3,
            found: 4,
        },
    );

    let cut = log();
    change(cut.path(), |lines| lines.truncate(3));
    is_broken(cut.path(), 0, Why::Cut { last: 3, head: 5 });

    let torn = log();
    let text = fs::read(only(torn.path())).unwrap();
    fs::write(only(torn.path()), &text[..text.len() - 9]).unwrap();
    is_broken(torn.path(), 0, Why::Cut { last: 4, head: 5 });

    let headless = log();
    fs::remove_file(headless.path().join("head")).unwrap();
    is_broken(headless.path(), 0, Why::NoHead);

    let begun = log();
    change(begun.path(), |lines| drop(lines.remove(0)));
    is_broken(begun.path(), 1, Why::NoBegin);

    let other = log();
    let of_another = reader::read(other.path(), &Key::new(&[8; 32]), usize::MAX, drop);
    assert!(matches!(of_another, Err(Error::Broken(_))));
}

#[test]
fn a_log_that_was_changed_is_not_continued() {
    let log = written(&["alice", "bob"]);
    change(log.path(), |lines| lines.truncate(2));
    let error = Log::open(log.path(), key()).unwrap_err();
    assert!(error.to_string().contains("its end is missing"), "{error}");
}

#[test]
fn an_incomplete_last_record_is_removed_and_the_log_goes_on() {
    let log = written(&["alice"]);
    let whole = fs::read(only(log.path())).unwrap();
    let half = [&whole, b"{\"number\":3".as_slice()].concat();
    fs::write(only(log.path()), half).unwrap();
    assert_eq!(verify(log.path()).unwrap().last, 2);
    let again = Log::open(log.path(), key()).unwrap();
    again.write(&record("bob")).unwrap();
    assert_eq!(verify(log.path()).unwrap().last, 3);
}

/// As a shim leaves it that is killed between two steps.
#[test]
fn a_file_without_a_line_is_as_if_it_were_not_there() {
    for begun in [b"".as_slice(), b"{\"number\":"] {
        let first = tempfile::tempdir().unwrap();
        fs::write(only(first.path()), begun).unwrap();
        let log = Log::open(first.path(), key()).unwrap();
        log.write(&record("alice")).unwrap();
        assert_eq!(verify(first.path()).unwrap().last, 2);

        let later = written(&["alice"]);
        fs::write(reader::path(later.path(), 3), begun).unwrap();
        assert_eq!(verify(later.path()).unwrap().last, 2);
        Log::open(later.path(), key()).unwrap();
    }
    let unsaid = written(&[]);
    fs::remove_file(unsaid.path().join("head")).unwrap();
    Log::open(unsaid.path(), key()).unwrap();
}

#[test]
fn a_log_whose_files_are_gone_is_not_begun_again() {
    let log = written(&["alice"]);
    fs::remove_file(only(log.path())).unwrap();
    let error = Log::open(log.path(), key()).unwrap_err();
    assert!(error.to_string().contains("its end is missing"), "{error}");
}

/// After a power failure the disk has what `head` says, and maybe more.
#[test]
fn head_is_no_further_than_the_disk() {
    let log = written(&["alice"]);
    let head = fs::read(log.path().join("head")).unwrap();
    let again = Log::open(log.path(), key()).unwrap();
    again.write(&record("bob")).unwrap();
    drop(again);
    assert_ne!(fs::read(log.path().join("head")).unwrap(), head);
    fs::write(log.path().join("head"), head).unwrap();
    assert_eq!(verify(log.path()).unwrap().last, 3);
}

#[test]
fn a_log_has_one_writer() {
    let folder = tempfile::tempdir().unwrap();
    let _log = Log::open(folder.path(), key()).unwrap();
    let second = Log::open(folder.path(), key());
    assert!(matches!(second, Err(Error::InUse { .. })), "{second:?}");
}

#[test]
fn what_cannot_be_written_is_said_and_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let log = Log::open(folder.path(), key()).unwrap();
    log.write(&record("alice")).unwrap();
    let length = fs::metadata(only(folder.path())).unwrap().len();
    // As on a full disk: a part of the record fits.
    let mut signal = SigSet::empty();
    signal.add(Signal::SIGXFSZ);
    signal.thread_block().unwrap();
    let (_, most) = getrlimit(Resource::RLIMIT_FSIZE).unwrap();
    setrlimit(Resource::RLIMIT_FSIZE, length + 20, most).unwrap();
    let refused = log.write(&record("bob")).unwrap_err();
    assert!(matches!(refused, Error::Write { .. }), "{refused:?}");
    setrlimit(Resource::RLIMIT_FSIZE, most, most).unwrap();
    let text = fs::read_to_string(only(folder.path())).unwrap();
    assert!(!text.contains("bob") && text.ends_with('\n'), "{text}");
    log.write(&record("carol")).unwrap();
    assert_eq!(verify(folder.path()).unwrap().last, 3);
}

/// Earlier files may be taken elsewhere; a file in between may not.
#[test]
fn a_long_log_is_in_several_files_of_which_the_first_may_leave() {
    let folder = tempfile::tempdir().unwrap();
    let log = Log::open(folder.path(), key()).unwrap();
    let why = "x".repeat(1024);
    let long = record("alice").denied(&why);
    let before = Instant::now();
    let mut count = 0;
    while reader::files(folder.path()).unwrap().len() < 3 {
        for _ in 0..1000 {
            log.write(&long).unwrap();
        }
        count += 1000;
    }
    // Also with an unoptimized build.
    let rate = f64::from(count) / before.elapsed().as_secs_f64();
    println!("{rate:.0} records a second, of a kilobyte each");
    let files = reader::files(folder.path()).unwrap();
    assert!(fs::metadata(only(folder.path())).unwrap().len() > MAX_FILE);
    assert_eq!(verify(folder.path()).unwrap().first, 1);
    let second = reader::path(folder.path(), files[1]);
    let kept = folder.path().join("kept");
    fs::rename(&second, &kept).unwrap();
    let gap = verify(folder.path());
    assert!(
        matches!(
            gap,
            Err(Error::Broken(Broken {
                line: 1,
                why: Why::Place { .. },
                ..
            }))
        ),
        "{gap:?}"
    );
    fs::rename(&kept, &second).unwrap();
    fs::remove_file(only(folder.path())).unwrap();
    assert_eq!(verify(folder.path()).unwrap().first, files[1]);
}

#[test]
fn a_denial_is_an_event_of_ocsf() {
    let line = Line {
        number: 3,
        time: "2026-11-30T09:00:00.250Z".into(),
        entry: Entry::Record(record("alice").denied("no role")),
    };
    let event = ocsf::event(&line).unwrap();
    assert_eq!(event["type_uid"], 600_301);
    assert_eq!(event["time"], 1_796_029_200_250_i64);
    assert_eq!(event["status_id"], 2);
    assert_eq!(event["status_detail"], "no role");
    assert_eq!(event["api"]["operation"], "start");
    assert_eq!(event["actor"]["user"]["name"], "cn:controller");
    assert_eq!(event["src_endpoint"]["ip"], "127.0.0.1");
    assert_eq!(event["resources"][0]["owner"]["uid"], "alice");
    let begin = Entry::Begin {
        previous: String::new(),
    };
    assert_eq!(
        ocsf::event(&Line {
            entry: begin,
            ..line
        }),
        None
    );
}

proptest! {
    /// Whatever names callers have.
    #[test]
    fn a_record_is_read_as_it_was_written(who in ".{0,40}", user_id in ".{1,40}", why in ".{0,2000}") {
        let caller = Caller { name: who, ..caller() };
        let written = Record::new(&caller, Operation::Attach).user(&user_id).denied(&why);
        let folder = tempfile::tempdir().unwrap();
        Log::open(folder.path(), key()).unwrap().write(&written).unwrap();
        let mut read = Vec::new();
        reader::read(folder.path(), &key(), usize::MAX, |line| read.push(line.entry)).unwrap();
        prop_assert_eq!(read.last(), Some(&Entry::Record(written)));
    }

    /// Any byte that is changed in a complete line is found.
    #[test]
    fn no_changed_byte_goes_unseen(at in any::<prop::sample::Index>(), bit in 0..8_u8) {
        let folder = written(&["alice", "bob"]);
        let mut bytes = fs::read(only(folder.path())).unwrap();
        let at = at.index(bytes.len());
        bytes[at] ^= 1 << bit;
        fs::write(only(folder.path()), bytes).unwrap();
        prop_assert!(verify(folder.path()).is_err());
    }
}
