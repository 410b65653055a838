//! Where OTLP goes, and how.

use std::{
    fmt, fs, io,
    path::{Path, PathBuf},
    str::FromStr,
};

use axum::http::{HeaderMap, HeaderName, HeaderValue};
use polydev_transport::{
    address::{is_safe_url, is_url},
    tls::Trust,
};
use url::Url;

/// Most bytes of a file of headers.
const MAX_HEADERS: u64 = 64 << 10;

/// An OpenTelemetry collector, or whatever else takes OTLP.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Collector {
    /// `http://HOST:PORT` or `https://HOST:PORT`; with [`Protocol::Http`] also with a path, below
    /// which the signals have theirs.
    pub endpoint: String,
    pub protocol: Protocol,
    /// Certificates of the authorities that are trusted, in PEM. `None` for those of the machine.
    pub authority: Option<PathBuf>,
    /// File with a header a line, `NAME: VALUE`, that all exports have; it may contain secrets.
    pub headers: Option<PathBuf>,
}

/// The two forms of OTLP, by the names that `OTEL_EXPORTER_OTLP_PROTOCOL` has for them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Protocol {
    #[default]
    Grpc,
    Http,
}

/// What is wrong with a [`Collector`]. The names of fields are those of options, without what comes
/// before them.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("`{field}` is `{given}`; {allowed}")]
    Invalid {
        field: &'static str,
        given: String,
        allowed: &'static str,
    },
    #[error("`{field}`: cannot use `{}`", path.display())]
    File {
        field: &'static str,
        path: PathBuf,
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    #[error("cannot export to `{endpoint}`")]
    Exporter {
        endpoint: String,
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl Protocol {
    const NAMES: [(Self, &'static str); 2] = [(Self::Grpc, "grpc"), (Self::Http, "http/protobuf")];
}

impl FromStr for Protocol {
    type Err = Error;

    fn from_str(given: &str) -> Result<Self, Error> {
        let found = Self::NAMES.iter().find(|(_, name)| *name == given);
        found.map(|(protocol, _)| *protocol).ok_or(Error::Invalid {
            field: "otlp_protocol",
            given: given.to_owned(),
            allowed: "must be grpc or http/protobuf",
        })
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let of_this = Self::NAMES.iter().find(|(protocol, _)| protocol == self);
        f.write_str(of_this.map_or("", |(_, name)| name))
    }
}

impl Collector {
    /// Checks the settings, and that the files can be read. Opens no connection.
    ///
    /// # Errors
    /// [`Error`], with the field that is wrong.
    pub fn check(&self) -> Result<(), Error> {
        let is_right = match self.protocol {
            Protocol::Grpc => ["http", "https"].iter().any(|s| is_url(s, &self.endpoint)),
            Protocol::Http => is_base(&self.endpoint),
        };
        if !is_right {
            return Err(Error::Invalid {
                field: "otlp_endpoint",
                given: self.endpoint.clone(),
                allowed: match self.protocol {
                    Protocol::Grpc => "must be http://HOST:PORT or https://HOST:PORT",
                    Protocol::Http => {
                        "must be a URL of http or https, without user, query and fragment"
                    }
                },
            });
        }
        if let Some(path) = self.authority.as_ref().filter(|_| !self.is_tls()) {
            return Err(Error::Invalid {
                field: "otlp_ca",
                given: path.display().to_string(),
                allowed: "is only for an endpoint with https",
            });
        }
        if let Some(path) = &self.authority {
            let trust = Trust::Server {
                authority: path.clone(),
            };
            trust.client().map_err(|error| Error::File {
                field: "otlp_ca",
                path: path.clone(),
                source: error.into(),
            })?;
        }
        if let Some(path) = &self.headers {
            if !is_safe_url(&self.endpoint) {
                return Err(Error::Invalid {
                    field: "otlp_headers_file",
                    given: path.display().to_string(),
                    allowed: "is only for https, or a collector on this machine: headers may be secrets",
                });
            }
            self.headers()?;
        }
        Ok(())
    }

    pub(crate) fn is_tls(&self) -> bool {
        self.endpoint.starts_with("https://")
    }

    /// Reads the headers; none without a file.
    pub(crate) fn headers(&self) -> Result<HeaderMap, Error> {
        let Some(path) = &self.headers else {
            return Ok(HeaderMap::new());
        };
        let unusable = |source: Box<dyn std::error::Error + Send + Sync>| Error::File {
            field: "otlp_headers_file",
            path: path.clone(),
            source,
        };
        let text = read(path).map_err(|error| unusable(error.into()))?;
        parse(&text).map_err(|wrong| unusable(wrong.into()))
    }
}

fn read(path: &Path) -> io::Result<String> {
    let length = fs::metadata(path)?.len();
    match length {
        0..=MAX_HEADERS => fs::read_to_string(path),
        _ => Err(io::Error::other("it is larger than 64 KiB")),
    }
}

/// Reads headers, a line each. The error names the line and not its value, which may be a secret.
fn parse(text: &str) -> Result<HeaderMap, String> {
    let mut headers = HeaderMap::new();
    let lines = text.lines().enumerate();
    let lines = lines.filter(|(_, line)| !line.trim().is_empty() && !line.starts_with('#'));
    for (at, line) in lines {
        let number = at + 1;
        let form = || format!("line {number} must have the form NAME: VALUE");
        let (name, value) = line.split_once(':').ok_or_else(form)?;
        let name = name.trim().to_ascii_lowercase();
        let name = name.parse::<HeaderName>().map_err(|_| form())?;
        let mut value = HeaderValue::from_str(value.trim()).map_err(|_| form())?;
        value.set_sensitive(true);
        headers.insert(name, value);
    }
    Ok(headers)
}

/// A URL to which the paths of the signals can be added.
fn is_base(given: &str) -> bool {
    Url::parse(given).is_ok_and(|url| {
        let is_bare = url.username().is_empty() && url.password().is_none();
        matches!(url.scheme(), "http" | "https")
            && url.has_host()
            && is_bare
            && url.query().is_none()
            && url.fragment().is_none()
    })
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn collector(endpoint: &str, protocol: Protocol) -> Collector {
        Collector {
            endpoint: endpoint.into(),
            protocol,
            authority: None,
            headers: None,
        }
    }

    #[test]
    fn an_endpoint_is_checked_for_its_protocol() {
        for right in [
            "http://127.0.0.1:4317",
            "https://collector.example.org:4317",
        ] {
            collector(right, Protocol::Grpc).check().unwrap();
            collector(right, Protocol::Http).check().unwrap();
        }
        let with_path = "https://otlp.example.org/otlp";
        collector(with_path, Protocol::Http).check().unwrap();
        for wrong in [with_path, "", "127.0.0.1:4317", "ftp://host:1"] {
            let error = collector(wrong, Protocol::Grpc).check().unwrap_err();
            let words = error.to_string();
            assert!(
                words.contains("otlp_endpoint") && words.contains(wrong),
                "{words}"
            );
        }
        for wrong in ["https://user@host/", "https://host/?a=b", "unix:///socket"] {
            assert!(collector(wrong, Protocol::Http).check().is_err(), "{wrong}");
        }
    }

    #[test]
    fn headers_are_sent_only_where_nobody_reads_them_on_the_way() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        writeln!(
            file,
            "# of the tenant\nAuthorization: Bearer one\n\nX-Scope-OrgID:  a:b "
        )
        .unwrap();
        let with_headers = |endpoint| Collector {
            headers: Some(file.path().into()),
            ..collector(endpoint, Protocol::Grpc)
        };
        let safe = with_headers("https://collector.example.org:4317");
        safe.check().unwrap();
        let headers = safe.headers().unwrap();
        assert_eq!(headers["authorization"], "Bearer one");
        assert_eq!(headers["x-scope-orgid"], "a:b");
        let error = with_headers("http://192.0.2.1:4317").check().unwrap_err();
        assert!(error.to_string().contains("otlp_headers_file"));
        with_headers("http://127.0.0.1:4317").check().unwrap();
    }

    #[test]
    fn an_error_about_a_header_does_not_show_its_value() {
        let wrong = parse("a: b\nmy hidden value").unwrap_err();
        assert!(wrong.contains("line 2") && !wrong.contains("hidden"));
    }

    #[test]
    fn protocols_have_the_names_that_opentelemetry_has_for_them() {
        for (protocol, name) in Protocol::NAMES {
            assert_eq!(name.parse::<Protocol>().unwrap(), protocol);
            assert_eq!(protocol.to_string(), name);
        }
        let error = "http/json".parse::<Protocol>().unwrap_err();
        assert!(error.to_string().contains("http/json"));
    }
}
