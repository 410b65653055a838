//! What the APIs have answered to the requests of one run: errors, and the tokens that they
//! count.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use http::StatusCode;
use parking_lot::Mutex;
use polydev_proto::{
    broker::{ApiError, Budget, ModelUsage, Seen as Message},
    budget::{Exhausted, Used},
    provider::Vendor,
};

use crate::usage::Tokens;

/// Most models of one run that have figures of their own. A gateway may name as many as it likes.
const MAX_MODELS: usize = 20;
const OTHER: &str = "other";

/// Stands for a status if there is no answer.
const UNREACHED: u16 = 0;

/// All of it, from the start of the run.
#[derive(Debug, Default)]
pub(crate) struct Seen(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    usage: Vec<ModelUsage>,
    errors: BTreeMap<(String, u32), u64>,
    overloaded: Option<Instant>,
    refused: Option<ApiError>,
    requests: u64,
    over_budget: String,
}

impl Seen {
    /// Continues what an earlier broker has seen.
    pub(crate) fn new(before: Option<&Message>) -> Self {
        let Some(before) = before.cloned() else {
            return Self::default();
        };
        let errors = before.errors.into_iter();
        let overloaded = before.overloaded_ms.map(Duration::from_millis);
        let state = State {
            usage: before.usage,
            errors: errors
                .map(|error| ((error.provider, error.status), error.count))
                .collect(),
            overloaded: overloaded.and_then(|ago| Instant::now().checked_sub(ago)),
            refused: before.refused,
            requests: before.requests,
            over_budget: before.over_budget,
        };
        Self(state.into())
    }

    /// The same as a message, without the names of container and run.
    pub(crate) fn message(&self) -> Message {
        let state = self.0.lock();
        let errors = state.errors.iter();
        let error = |((provider, status), count): (&(String, u32), &u64)| ApiError {
            provider: provider.clone(),
            status: *status,
            count: *count,
        };
        let overloaded_ms =
            |since: Instant| u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX);
        Message {
            usage: state.usage.clone(),
            errors: errors.map(error).collect(),
            overloaded_ms: state.overloaded.map(overloaded_ms),
            refused: state.refused.clone(),
            requests: state.requests,
            over_budget: state.over_budget.clone(),
            ..Message::default()
        }
    }

    /// Counts another request, if the budget allows it.
    ///
    /// # Errors
    /// [`Exhausted`], which is for the driver too.
    pub(crate) fn ask(&self, budget: Option<&Budget>) -> Result<(), Exhausted> {
        let mut state = self.0.lock();
        let own = Used::of(state.requests, &state.usage);
        let checked = budget.map_or(Ok(()), |budget| budget.check(own));
        match &checked {
            Ok(()) => state.requests += 1,
            Err(exhausted) => state.over_budget = exhausted.to_string(),
        }
        checked
    }

    /// An API has answered; `is_refusal` if it does not take the key. Returns whether that is new
    /// for the driver.
    pub(crate) fn answered(&self, provider: Vendor, status: StatusCode, is_refusal: bool) -> bool {
        let is_overload = status == StatusCode::TOO_MANY_REQUESTS || status.is_server_error();
        let mut state = self.0.lock();
        if !is_overload && !status.is_client_error() {
            return state.overloaded.take().is_some();
        }
        state.error(provider, status.as_u16(), is_overload);
        if is_refusal && state.refused.is_none() {
            state.refused = Some(ApiError {
                provider: provider.to_string(),
                status: status.as_u16().into(),
                count: 1,
            });
        }
        true
    }

    /// Since when the API has too much to do.
    pub(crate) fn overloaded(&self) -> Option<Instant> {
        self.0.lock().overloaded
    }

    /// An answer reports an overload after its status; `ended` is the beginning of the overload
    /// that it seemed to end.
    pub(crate) fn overload(&self, provider: Vendor, status: StatusCode, ended: Option<Instant>) {
        let mut state = self.0.lock();
        state.overloaded = state.overloaded.or(ended);
        state.error(provider, status.as_u16(), true);
    }

    /// An API could not be reached.
    pub(crate) fn unreached(&self, provider: Vendor) {
        self.0.lock().error(provider, UNREACHED, true);
    }

    /// An answer has stated that it used more tokens of a model than `known`; `is_first` if
    /// nothing of the answer is counted yet.
    pub(crate) fn used(
        &self,
        provider: Vendor,
        model: &str,
        known: Tokens,
        stated: Tokens,
        is_first: bool,
    ) {
        let mut state = self.0.lock();
        let usage = state.model(provider, model);
        let add = |to: &mut u64, known: u64, stated: u64| {
            *to = to.saturating_add(stated.saturating_sub(known));
        };
        usage.requests += u64::from(is_first);
        add(&mut usage.input_tokens, known.input, stated.input);
        add(
            &mut usage.cached_input_tokens,
            known.cached_input,
            stated.cached_input,
        );
        add(
            &mut usage.cache_write_tokens,
            known.cache_write,
            stated.cache_write,
        );
        add(&mut usage.output_tokens, known.output, stated.output);
    }
}

impl State {
    fn error(&mut self, provider: Vendor, status: u16, is_overload: bool) {
        if is_overload {
            self.overloaded.get_or_insert_with(Instant::now);
        } else {
            self.overloaded = None;
        }
        let of = (provider.to_string(), status.into());
        *self.errors.entry(of).or_default() += 1;
    }

    fn model(&mut self, provider: Vendor, model: &str) -> &mut ModelUsage {
        let is = |known: &ModelUsage, model: &str| {
            known.provider == provider.name() && known.model == model
        };
        let known = self.usage.iter().position(|known| is(known, model));
        let (at, model) = match known {
            Some(at) => (Some(at), model),
            None if self.usage.len() < MAX_MODELS => (None, model),
            None => (self.usage.iter().position(|known| is(known, OTHER)), OTHER),
        };
        let at = at.unwrap_or_else(|| {
            self.usage.push(ModelUsage {
                provider: provider.to_string(),
                model: model.to_owned(),
                ..ModelUsage::default()
            });
            self.usage.len() - 1
        });
        &mut self.usage[at]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BUSY: StatusCode = StatusCode::TOO_MANY_REQUESTS;

    #[test]
    fn errors_are_counted_and_an_answer_ends_an_overload() {
        let seen = Seen::default();
        assert!(!seen.answered(Vendor::OpenAi, StatusCode::OK, false));
        assert!(seen.answered(Vendor::OpenAi, BUSY, false));
        assert!(seen.answered(Vendor::OpenAi, BUSY, false));
        seen.unreached(Vendor::Google);
        let message = seen.message();
        let errors: Vec<_> = message
            .errors
            .iter()
            .map(|error| (&*error.provider, error.status, error.count))
            .collect();
        assert_eq!(errors, [("google", 0, 1), ("openai", 429, 2)]);
        assert!(message.overloaded_ms.is_some());

        assert!(seen.answered(Vendor::OpenAi, StatusCode::OK, false));
        assert_eq!(seen.message().overloaded_ms, None);
        seen.answered(Vendor::OpenAi, BUSY, false);
        seen.answered(Vendor::OpenAi, StatusCode::BAD_REQUEST, false);
        assert_eq!(seen.message().overloaded_ms, None);
    }

    #[test]
    fn the_next_broker_continues_what_was_seen() {
        let seen = Seen::default();
        let tokens = Tokens {
            input: 5,
            output: 2,
            ..Tokens::default()
        };
        seen.used(Vendor::OpenAi, "m", Tokens::default(), tokens, true);
        seen.answered(Vendor::Anthropic, StatusCode::UNAUTHORIZED, true);
        seen.answered(Vendor::OpenAi, BUSY, false);
        let next = Seen::new(Some(&seen.message()));
        next.used(Vendor::OpenAi, "m", Tokens::default(), tokens, true);
        next.answered(Vendor::Anthropic, StatusCode::FORBIDDEN, true);
        let message = next.message();
        assert_eq!(message.usage.len(), 1);
        assert_eq!(message.usage[0].requests, 2);
        assert_eq!(message.usage[0].input_tokens, 10);
        assert_eq!(message.refused.unwrap().status, 401);
        assert_eq!(message.errors.len(), 3);
    }

    #[test]
    fn models_without_end_have_one_figure() {
        let seen = Seen::default();
        let tokens = Tokens {
            input: 1,
            ..Tokens::default()
        };
        for number in 0..100 {
            let model = format!("model-{number}");
            seen.used(Vendor::Google, &model, Tokens::default(), tokens, true);
        }
        let usage = seen.message().usage;
        assert_eq!(usage.len(), MAX_MODELS + 1);
        assert_eq!(usage[MAX_MODELS].model, OTHER);
        assert_eq!(usage.iter().map(|used| used.input_tokens).sum::<u64>(), 100);
    }
}
