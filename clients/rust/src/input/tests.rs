use futures_util::FutureExt;
use proptest::prelude::*;

use super::*;

fn accepted(files_offset: u64, stdin_offset: u64) -> Accepted {
    Accepted {
        files_offset,
        stdin_offset,
        ..Accepted::default()
    }
}

/// All that a call would send now: bytes of files, bytes of stdin, other messages.
fn drain(input: &Input, call: u64) -> (Vec<u8>, Vec<u8>, Vec<Message>) {
    let (mut files, mut stdin, mut others) = (Vec::new(), Vec::new(), Vec::new());
    while let Some(Some(message)) = input.next(call).now_or_never() {
        match message.input.unwrap() {
            Message::Files(bytes) => files.extend_from_slice(&bytes),
            Message::Stdin(bytes) => stdin.extend_from_slice(&bytes),
            other => others.push(other),
        }
    }
    (files, stdin, others)
}

fn write(input: &Input, bytes: Vec<u8>) -> Result<(), Closed> {
    input.write(bytes).now_or_never().expect("there is room")
}

proptest! {
    #[test]
    fn whatever_breaks_the_run_gets_every_byte_once(
        files in 0_usize..200_000,
        pieces in prop::collection::vec(0_usize..100_000, 0..8),
        taken in prop::collection::vec(0.0_f64..=1.0, 0..4),
    ) {
        let total = files + pieces.iter().sum::<usize>();
        let bytes: Vec<u8> = (0..total).map(|at| (at % 251).to_le_bytes()[0]).collect();
        let input = Input::of_run(files as u64, true);
        let (mut written, mut has) = (0, Vec::new());
        let mut call = input.next_call();
        let mut pieces = std::iter::once(files).chain(pieces);
        for part in taken {
            if let Some(piece) = pieces.next() {
                write(&input, bytes[written..written + piece].to_vec()).unwrap();
                written += piece;
            }
            let (sent_files, sent_stdin, _) = drain(&input, call);
            let sent = [sent_files, sent_stdin].concat();
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss,
                clippy::cast_precision_loss, reason = "some part of it")]
            let arrives = (sent.len() as f64 * part) as usize;
            has.extend_from_slice(&sent[..arrives]);
            call = input.next_call();
            prop_assert!(drain(&input, call).0.is_empty(), "nothing before it is accepted");
            let of_files = has.len().min(files);
            let accepted = accepted(of_files as u64, (has.len() - of_files) as u64);
            input.go_on(&accepted).unwrap();
        }
        for piece in pieces {
            write(&input, bytes[written..written + piece].to_vec()).unwrap();
            written += piece;
            let (sent_files, sent_stdin, _) = drain(&input, call);
            has.extend(sent_files);
            has.extend(sent_stdin);
        }
        input.close();
        let (sent_files, sent_stdin, others) = drain(&input, call);
        has.extend(sent_files);
        has.extend(sent_stdin);
        prop_assert!(has == bytes);
        prop_assert_eq!(others.len(), 1);
        prop_assert_eq!(write(&input, vec![0]), Err(Closed));
    }
}

#[test]
fn a_run_that_others_wrote_to_gets_what_is_new() {
    let input = Input::of_attach();
    write(&input, b"more".to_vec()).unwrap();
    let call = input.next_call();
    assert!(drain(&input, call).1.is_empty());
    input.go_on(&accepted(3, 100)).unwrap();
    assert_eq!(drain(&input, call).1, b"more");
    let call = input.next_call();
    input.go_on(&accepted(3, 102)).unwrap();
    assert_eq!(drain(&input, call).1, b"re");
}

#[test]
fn a_run_that_had_some_of_it_from_an_earlier_process_gets_the_rest() {
    let input = Input::of_run(0, false);
    let call = input.next_call();
    write(&input, b"ab".to_vec()).unwrap();
    input.go_on(&accepted(0, 3)).unwrap();
    assert!(drain(&input, call).1.is_empty());
    write(&input, b"cdef".to_vec()).unwrap();
    assert_eq!(drain(&input, call).1, b"def");
}

#[test]
fn input_that_was_let_go_is_missed_and_not_skipped() {
    let input = Input::of_run(0, true);
    let mut call = input.next_call();
    for _ in 0..=MAX_KEPT / MAX_WAITING {
        write(&input, vec![0; 1 << 20]).unwrap();
        drain(&input, call);
    }
    call = input.next_call();
    assert!(input.go_on(&accepted(0, 10)).is_err());
    input.go_on(&accepted(0, MAX_KEPT)).unwrap();
    assert_eq!(drain(&input, call).1.len(), 1 << 20);
}

#[test]
fn whoever_writes_more_than_is_sent_waits() {
    let input = Input::of_run(0, true);
    let call = input.next_call();
    write(&input, vec![0; 1 << 20]).unwrap();
    assert!(input.write(vec![0; 1]).now_or_never().is_none());
    drain(&input, call);
    assert!(input.write(vec![0; 1]).now_or_never().is_some());

    // Also a writer that waits while the connection is broken, if the run has all of its input.
    let call = input.next_call();
    write(&input, vec![0; (1 << 20) - 1]).unwrap();
    let mut waiting = Box::pin(input.write(vec![0; 1]));
    assert!((&mut waiting).now_or_never().is_none());
    input.go_on(&accepted(0, 2 << 20)).unwrap();
    assert!((&mut waiting).now_or_never().is_some());
    assert_eq!(drain(&input, call).1.len(), 1);
    input.end();
    assert!(input.next(call).now_or_never().unwrap().is_none());
    assert_eq!(write(&input, vec![0]), Err(Closed));
}

#[test]
fn the_last_size_of_the_terminal_is_told_again_by_the_next_call() {
    let size = |rows| TerminalSize { rows, columns: 80 };
    let input = Input::of_run(0, true);
    let call = input.next_call();
    input.resize(size(1));
    input.resize(size(2));
    assert_eq!(drain(&input, call).2, [Message::Resize(size(2))]);
    let call = input.next_call();
    assert_eq!(drain(&input, call).2, [Message::Resize(size(2))]);
}
