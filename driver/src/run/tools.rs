//! Calls of tools that the model of an agent wants to make, and that a shim decides about. They wait
//! here for the answer of any shim that listens. Init repeats those that have none on every new
//! connection, so nothing of this outlives the driver.

use std::{
    collections::{BTreeMap, VecDeque, btree_map::Entry},
    sync::Arc,
};

use parking_lot::Mutex;
use polydev_proto::{
    agent::{MAX_ARGUMENTS, MAX_CALLS, MAX_TOOL_NAME},
    id::RunId,
    init::{ToolAnswer, ToolCall},
};
use tokio::sync::{Notify, broadcast};

use super::{
    Run,
    book::{CallNews, Runs},
};

/// What may have entered a conversation: far more than there are kinds of.
const MAX_ENTERED: usize = 16;

/// The calls of one run.
#[derive(Debug, Default)]
pub(super) struct Calls {
    waiting: Mutex<BTreeMap<u64, Arc<ToolCall>>>,
    answers: Mutex<VecDeque<ToolAnswer>>,
    answered: Notify,
}

impl Calls {
    /// The next answer for init.
    ///
    /// # Cancel safety
    /// Loses nothing.
    pub(super) async fn answer(&self) -> ToolAnswer {
        loop {
            if let Some(answer) = self.answers.lock().pop_front() {
                return answer;
            }
            self.answered.notified().await;
        }
    }
}

impl Runs {
    /// A call waits for an answer, or does not any longer. One that was called before waits already.
    pub(super) fn tool_called(&self, run: &Run, call: ToolCall) {
        let run_id = run.claimed.run_id;
        if call.withdrawn {
            if run.tools.waiting.lock().remove(&call.number).is_some() {
                self.tell_of_call(run_id, CallNews::Ended(call.number));
            }
            return;
        }
        let is_too_long = call.name.len() > MAX_TOOL_NAME
            || call.arguments.len() > MAX_ARGUMENTS
            || call.entered.len() > MAX_ENTERED
            || call
                .entered
                .iter()
                .any(|entered| entered.len() > MAX_TOOL_NAME);
        let mut waiting = run.tools.waiting.lock();
        if is_too_long || waiting.len() >= MAX_CALLS {
            return tracing::warn!(%run_id, "ignoring a call of a tool that is too long, or too many");
        }
        let Entry::Vacant(place) = waiting.entry(call.number) else {
            return;
        };
        let call = place.insert(Arc::new(call)).clone();
        drop(waiting);
        tracing::debug!(%run_id, number = call.number, tool = call.name, "a tool was called");
        self.tell_of_call(run_id, CallNews::Waits(call));
    }

    fn tell_of_call(&self, run_id: RunId, news: CallNews) {
        if let Ok(run) = self.find(run_id, None) {
            // Often there is no listener.
            let _listeners = self.tool_calls.send((run, news));
        }
    }

    /// The run is over: nobody waits for the answers to its calls.
    pub(super) fn end_tool_calls(&self, run: &Run) {
        let waiting = std::mem::take(&mut *run.tools.waiting.lock());
        for number in waiting.into_keys() {
            self.tell_of_call(run.claimed.run_id, CallNews::Ended(number));
        }
    }

    /// Answers a call, or says that it must wait. False if no such call waits: somebody was first, or
    /// the run is over.
    #[must_use]
    pub fn answer_tool_call(&self, run: &Run, answer: ToolAnswer) -> bool {
        let number = answer.number;
        let is_last = answer.wait_seconds == 0;
        let mut waiting = run.tools.waiting.lock();
        if run.is_over() || !waiting.contains_key(&number) {
            return false;
        }
        if is_last {
            waiting.remove(&number);
        }
        {
            // However many shims say that a call waits, init need hear the last one alone.
            let mut answers = run.tools.answers.lock();
            answers.retain(|other| other.number != number);
            answers.push_back(answer);
        }
        drop(waiting);
        run.tools.answered.notify_one();
        if is_last {
            self.tell_of_call(run.claimed.run_id, CallNews::Ended(number));
        }
        true
    }

    /// Each call that comes to wait or ends, from now on.
    pub fn watch_tool_calls(&self) -> broadcast::Receiver<(Arc<Run>, CallNews)> {
        self.tool_calls.subscribe()
    }

    /// All calls that wait.
    pub fn waiting_tool_calls(&self) -> Vec<(Arc<Run>, Arc<ToolCall>)> {
        let runs = self.all(|run| !run.is_over() && !run.tools.waiting.lock().is_empty());
        let waiting = runs.into_iter().flat_map(|run| {
            let calls: Vec<_> = run.tools.waiting.lock().values().cloned().collect();
            calls.into_iter().map(move |call| (run.clone(), call))
        });
        waiting.collect()
    }
}
