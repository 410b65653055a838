use super::*;
use proptest::prelude::*;

/// The id of one of several runs.
pub(in crate::run) fn run_id(number: u8) -> RunId {
    RunId::new(SystemTime::UNIX_EPOCH, [number; 10])
}

pub(in crate::run) fn claimed(run_id: RunId) -> Claimed {
    Claimed {
        run_id,
        user_id: "alice".into(),
        caller: "cn:app".into(),
        caller_user: "app".into(),
        ballot: Ballot {
            attempt: 1,
            nonce: 7,
        },
        slot_id: "node/alloc".into(),
        generation: Generation(3),
        spec_hash: "00".into(),
        token: None,
        claimed_at: SystemTime::UNIX_EPOCH,
        uptime: Duration::from_secs(5),
        timeout: Duration::from_secs(60),
        kill_timeout: Duration::from_secs(30),
        max_api_wait: None,
        keeps_on: false,
        drop_oldest: false,
        files_bytes: 0,
        provider: "anthropic".into(),
        on_demand: false,
        share: Amount::default(),
        boot_id: "boot".into(),
        container: "c0ffee".into(),
        pid: 1,
        pid_start: 2,
        link: "/run/link/x".into(),
    }
}

fn records() -> Vec<Record> {
    vec![
        Record::Claimed(claimed(run_id(1)).into()),
        Record::Started {
            run_id: run_id(1),
            after: Duration::from_millis(3),
        },
        Record::Cancelled {
            run_id: run_id(1),
            reason: "the node is drained".into(),
            credential_refused: false,
            api_unavailable: false,
            budget_exhausted: false,
        },
        Record::Exited {
            run_id: run_id(1),
            ended: Ended {
                reason: Reason::OutOfMemory,
                exit_code: 137,
                ..Ended::default()
            },
        },
        Record::Fenced {
            run_id: run_id(2),
            user_id: Some("alice".into()),
            ballot: Ballot {
                attempt: 2,
                nonce: u64::MAX,
            },
            at: SystemTime::UNIX_EPOCH,
            aborted: false,
            claims_on: ["a node".to_owned()].into(),
        },
    ]
}

fn format(version: u32) -> Record {
    Record::Format {
        version,
        begun: SystemTime::UNIX_EPOCH,
    }
}

fn bytes() -> Vec<u8> {
    std::iter::once(&format(VERSION))
        .chain(&records())
        .flat_map(encode)
        .collect()
}

#[test]
fn what_is_written_is_read_after_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let (mut journal, before) = Journal::open(folder.path()).unwrap();
    assert_eq!(before, []);
    for record in records() {
        journal.write(&record).unwrap();
    }
    let (mut journal, read) = Journal::open(folder.path()).unwrap();
    assert_eq!(read, records());
    let rewrite = journal.begin(&records()[..2]);
    // This comes between, as it does from another thread.
    journal.write(records().last().unwrap()).unwrap();
    let more = journal.finish(rewrite.write()).unwrap().unwrap();
    assert!(journal.finish(more.sync()).unwrap().is_none());
    let (_, read) = Journal::open(folder.path()).unwrap();
    assert_eq!(
        read,
        [&records()[..2], &records()[4..]].concat(),
        "rewritten"
    );
}

/// Wherever the last write was cut, the records before it survive.
#[test]
fn a_torn_end_is_cut_off_wherever_it_is_torn() {
    let bytes = bytes();
    let ends: Vec<usize> = (0..bytes.len())
        .filter(|at| bytes[*at] == b'\n')
        .map(|at| at + 1)
        .collect();
    for cut in 0..bytes.len() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("runs.journal"), &bytes[..cut]).unwrap();
        let (mut journal, read) = Journal::open(folder.path()).unwrap();
        let lines = ends.iter().filter(|end| **end <= cut).count();
        let whole = lines.saturating_sub(1); // The first line is the format.
        assert_eq!(read, records()[..whole], "cut at {cut}");
        journal.write(records().last().unwrap()).unwrap();
        let (_, read) = Journal::open(folder.path()).unwrap();
        assert_eq!(read.len(), whole + 1, "cut at {cut}");
    }
}

#[test]
fn what_cannot_be_understood_is_refused_and_left_as_it_is() {
    let refused = |bytes: &[u8]| {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("runs.journal");
        fs::write(&path, bytes).unwrap();
        let error = Journal::open(folder.path()).unwrap_err().to_string();
        assert_eq!(fs::read(&path).unwrap(), bytes, "it is as it was");
        error
    };
    for other in [0, 2] {
        let told = format!("has version {other}, this driver reads 1");
        assert!(refused(&encode(&format(other))).contains(&told));
    }

    let format = encode(&format(VERSION));
    let mut damaged = bytes();
    damaged[format.len() + 30] ^= 1;
    let offset = format!("from byte {} on", format.len());
    assert!(refused(&damaged).contains(&offset));

    let unknown = br#"{"record":"leased","run_id":"a"}"#;
    let line = [checksum(unknown).as_bytes(), b" ", unknown, b"\n"].concat();
    let unknown = [&format[..], &line, &format].concat();
    assert!(refused(&unknown).contains("`leased`"));
    for other in [&b"not a journal\n"[..], b"nor this", b"c0ffee00 {}"] {
        assert!(refused(other).contains("from byte 0 on"));
    }
}

#[test]
fn a_record_that_cannot_be_written_is_told_and_leaves_those_before_it() {
    let folder = tempfile::tempdir().unwrap();
    let (mut journal, _) = Journal::open(folder.path()).unwrap();
    journal.write(&records()[0]).unwrap();
    // A full disk, as the kernel simulates it.
    journal.file = Arc::new(File::options().write(true).open("/dev/full").unwrap());
    assert!(journal.write(&records()[1]).is_err());
    let (_, read) = Journal::open(folder.path()).unwrap();
    assert_eq!(read, records()[..1]);
}

proptest! {
    #[test]
    fn any_bytes_are_read_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let _refused = decode(Path::new("/"), &bytes).is_err();
    }
}

/// Fields that were added later may be missing.
#[test]
fn records_of_the_first_drivers_are_read() {
    let mut older = serde_json::to_value(&records()[0]).unwrap();
    older.as_object_mut().unwrap().remove("on_demand").unwrap();
    let record: Record = serde_json::from_value(older).unwrap();
    assert_eq!(record, records()[0]);
    let older = format!(r#"{{"record":"cancelled","run_id":"{}"}}"#, run_id(1));
    let record: Record = serde_json::from_str(&older).unwrap();
    assert_eq!(record.run_id(), Some(run_id(1)));
}
