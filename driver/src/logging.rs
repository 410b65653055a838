//! Log lines in the format that go-plugin's host reads from stderr: one JSON object per
//! line. `@level`, `@message` and `@timestamp` must be strings (anything else stops the
//! agent).

use std::{
    fmt,
    io::{self, Write},
    sync::LazyLock,
    time::{SystemTime, UNIX_EPOCH},
};

use polydev_telemetry::logs::Lines;
use serde_json::{Map, Value};
use tracing::{
    Event, Level, Subscriber,
    field::{Field, Visit},
    span,
};
use tracing_subscriber::{
    EnvFilter, Layer,
    fmt::{FmtContext, FormatEvent, FormatFields, MakeWriter, format::Writer},
    layer::{Context, SubscriberExt},
    registry::LookupSpan,
    util::SubscriberInitExt,
};

/// Sends all events to stderr, and each panic as one line. The agent filters by its own
/// level; `POLYDEV_LOG` (a tracing filter, `info` by default) limits what is sent. Also to
/// [`collected`], from when that has a collector.
pub fn init() {
    let filter = EnvFilter::try_from_env("POLYDEV_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let lines = tracing_subscriber::fmt::layer()
        .event_format(Hclog)
        .with_writer(Stderr);
    tracing_subscriber::registry()
        .with(filter)
        .with(SpanFields)
        .with(lines)
        .with(collected().clone())
        .init();
    std::panic::set_hook(Box::new(
        |panic| tracing::error!(%panic, "bug: a task panicked"),
    ));
}

/// What sends the lines of this process to a collector, which it learns later than it logs.
pub fn collected() -> &'static Lines {
    static LINES: LazyLock<Lines> = LazyLock::new(Lines::default);
    &LINES
}

/// Writes to stderr and ignores that nobody reads it: after a crash of the agent the pipe
/// is broken, and the driver continues.
#[derive(Clone, Copy)]
struct Stderr;

impl Write for Stderr {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let _unread = io::stderr().write_all(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Stderr {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        *self
    }
}

/// Keeps the fields of each span, which the lines within it have too.
struct SpanFields;

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for SpanFields {
    fn on_new_span(
        &self,
        attributes: &span::Attributes<'_>,
        id: &span::Id,
        context: Context<'_, S>,
    ) {
        let mut fields = Fields(Map::new());
        attributes.record(&mut fields);
        if let Some(span) = context.span(id) {
            span.extensions_mut().insert(fields);
        }
    }
}

struct Hclog;

impl<S, N> FormatEvent<S, N> for Hclog
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut fields = Fields(Map::new());
        // From the outermost span inwards: what the event itself says is the last word.
        for span in context
            .event_scope()
            .into_iter()
            .flat_map(|scope| scope.from_root())
        {
            if let Some(Fields(own)) = span.extensions().get() {
                fields.0.extend(own.clone());
            }
        }
        event.record(&mut fields);
        let level = match *event.metadata().level() {
            Level::TRACE => "trace",
            Level::DEBUG => "debug",
            Level::INFO => "info",
            Level::WARN => "warn",
            Level::ERROR => "error",
        };
        fields.0.insert("@level".into(), level.into());
        fields
            .0
            .insert("@module".into(), event.metadata().target().into());
        fields
            .0
            .insert("@timestamp".into(), timestamp(SystemTime::now()).into());
        fields.0.entry("@message").or_insert("".into());
        writeln!(writer, "{}", Value::Object(fields.0))
    }
}

/// Every value as a string: the host requires strings for some fields and prints all.
struct Fields(Map<String, Value>);

impl Visit for Fields {
    fn record_str(&mut self, field: &Field, value: &str) {
        let name = if field.name() == "message" {
            "@message"
        } else {
            field.name()
        };
        self.0.insert(name.into(), value.into());
    }

    fn record_error(&mut self, field: &Field, value: &(dyn std::error::Error + 'static)) {
        self.record_str(field, &crate::chain(value));
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.record_str(field, &format!("{value:?}"));
    }
}

/// `2026-01-02T03:04:05.123456Z`: hclog requires exactly six digits.
fn timestamp(time: SystemTime) -> String {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let stamp = prost_types::Timestamp {
        seconds: i64::try_from(since.as_secs()).unwrap_or(0),
        nanos: 0,
    };
    let whole = stamp.to_string();
    format!(
        "{}.{:06}Z",
        whole.trim_end_matches('Z'),
        since.subsec_micros()
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{sync::Arc, time::Duration};

    #[test]
    fn a_line_has_the_fields_of_its_spans_and_its_own_last() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let written = Arc::new(file.reopen().unwrap());
        let lines = tracing_subscriber::fmt::layer()
            .event_format(Hclog)
            .with_writer(written);
        let subscriber = tracing_subscriber::registry().with(SpanFields).with(lines);
        tracing::subscriber::with_default(subscriber, || {
            let outer = tracing::info_span!("slot", slot_id = "a/b");
            outer.in_scope(|| {
                let inner = tracing::info_span!("run", run_id = 7);
                inner.in_scope(|| tracing::warn!(slot_id = "c", "words"));
            });
        });
        let line: Value = serde_json::from_reader(file).unwrap();
        assert_eq!(line["run_id"], "7");
        assert_eq!(line["slot_id"], "c");
        assert_eq!(line["@message"], "words");
        assert_eq!(line["@level"], "warn");
    }

    #[test]
    fn timestamps_have_six_fraction_digits() {
        let time = UNIX_EPOCH + Duration::new(1_767_323_045, 123_456_789);
        assert_eq!(timestamp(time), "2026-01-02T03:04:05.123456Z");
        assert_eq!(timestamp(UNIX_EPOCH), "1970-01-01T00:00:00.000000Z");
    }
}
