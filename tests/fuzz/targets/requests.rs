//! Model requests as a container may send them: where they go, and that no credential of the
//! container's own goes there.
#![no_main]

use http::{HeaderName, HeaderValue, Request, Uri};
use libfuzzer_sys::fuzz_target;
use polydev_broker::request::read;
use url::Url;

const CREDENTIALS: [&str; 7] = [
    "api-key",
    "authorization",
    "cookie",
    "proxy-authorization",
    "x-api-key",
    "x-goog-api-key",
    "x-goog-user-project",
];
const OF_ONE_CONNECTION: [&str; 4] = ["connection", "host", "transfer-encoding", "upgrade"];
const PARAMETERS: [&str; 4] = ["key", "api_key", "access_token", "oauth_token"];

/// The first line is the target, each of the others a header.
fn request(data: &[u8]) -> Option<Request<()>> {
    let mut lines = data.split(|byte| *byte == b'\n');
    let uri = Uri::try_from(lines.next()?).ok()?;
    let mut request = Request::post(uri).body(()).ok()?;
    for line in lines {
        let colon = line.iter().position(|byte| *byte == b':')?;
        let name = HeaderName::from_bytes(&line[..colon]).ok()?;
        let value = HeaderValue::from_bytes(&line[colon + 1..]).ok()?;
        request.headers_mut().append(name, value);
    }
    Some(request)
}

fuzz_target!(|data: &[u8]| {
    let Some(request) = request(data) else {
        return;
    };
    let Ok(asked) = read(&request.into_parts().0) else {
        return;
    };
    let url = Url::parse(&format!("https://api.example{}", asked.path)).expect("a URL");
    assert_eq!(url.host_str(), Some("api.example"));
    // Whoever reads the URL reads the path that was checked.
    let path = asked.path.split('?').next().expect("there is always one");
    assert_eq!(url.path(), path);
    for name in CREDENTIALS.iter().chain(&OF_ONE_CONNECTION) {
        assert!(!asked.headers.contains_key(*name), "{name}");
    }
    for (name, _) in form_urlencoded::parse(url.query().unwrap_or_default().as_bytes()) {
        let name = name.to_ascii_lowercase();
        assert!(!PARAMETERS.contains(&&*name), "{name}");
    }
});
