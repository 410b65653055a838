//! A client for servers of others, which may be behind a proxy.

use std::{env, time::Duration};

use reqwest::{Client, NoProxy, Proxy, redirect};

/// It follows no redirection, and takes the proxy of `HTTPS_PROXY` for https alone: one for http could
/// replace the answers.
///
/// # Errors
/// If the proxy is not valid, or the machine has no certificates.
pub fn client(timeout: Duration) -> reqwest::Result<Client> {
    // In tests, an earlier call may have installed the provider.
    let _installed = rustls::crypto::ring::default_provider().install_default();
    let mut client = Client::builder().no_proxy();
    let of_environment = ["HTTPS_PROXY", "https_proxy"].map(env::var);
    if let Some(proxy) = of_environment.into_iter().find_map(Result::ok) {
        client = client.proxy(Proxy::https(proxy)?.no_proxy(NoProxy::from_env()));
    }
    client
        .redirect(redirect::Policy::none())
        .timeout(timeout)
        .build()
}
