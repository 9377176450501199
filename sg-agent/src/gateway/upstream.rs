//! The way to the endpoint: plain or TLS connections, kept for as long as the endpoint keeps them. Judges no request.

use std::net::SocketAddr;
use std::time::Duration;

use http::uri::{Authority, PathAndQuery, Scheme};
use http::{HeaderValue, Request, Response, Uri, Version, header};
use http_body_util::combinators::BoxBody;
use hyper::body::{Bytes, Incoming};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::client::legacy::{Client, Error};
use hyper_util::rt::{TokioExecutor, TokioTimer};

use super::{FIELDS, GatewayError};

/// A body that passes through.
pub type Body = BoxBody<Bytes, hyper::Error>;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// How long an idle connection is kept. Servers close theirs after a minute or later.
const IDLE: Duration = Duration::from_secs(20);

/// An endpoint that requests are sent to.
#[derive(Debug)]
pub struct Upstream {
    url: String,
    scheme: Scheme,
    authority: Authority,
    client: Connections,
}

#[derive(Debug)]
enum Connections {
    Plain(Client<HttpConnector, Body>),
    Tls(Client<HttpsConnector<HttpConnector>, Body>),
}

impl Upstream {
    /// Connects to nothing yet.
    pub fn new(endpoint: &str) -> Result<Self, GatewayError> {
        let failed = |cause: String| GatewayError::Upstream { endpoint: endpoint.to_owned(), cause };
        let uri: Uri = endpoint.parse().map_err(|error: http::uri::InvalidUri| failed(error.to_string()))?;
        let (Some(scheme), Some(authority)) = (uri.scheme().cloned(), uri.authority().cloned()) else {
            return Err(failed("it is no http or https URL".into()));
        };
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        tcp.set_nodelay(true);
        tcp.set_connect_timeout(Some(CONNECT_TIMEOUT));
        let mut builder = Client::builder(TokioExecutor::new());
        builder
            .pool_idle_timeout(IDLE)
            .pool_timer(TokioTimer::new())
            .http1_preserve_header_case(true)
            .http1_max_headers(FIELDS)
            // The client has signed its own.
            .set_host(false);
        let client = if scheme == Scheme::HTTPS {
            let tls = HttpsConnectorBuilder::new().try_with_platform_verifier();
            let tls = tls.map_err(|error| failed(format!("{error}; install ca-certificates")))?;
            Connections::Tls(builder.build(tls.https_only().enable_http1().wrap_connector(tcp)))
        } else {
            // Without TLS, a machine without CA certificates does as well.
            Connections::Plain(builder.build(tcp))
        };
        Ok(Self { url: endpoint.to_owned(), scheme, authority, client })
    }

    /// The endpoint's URL.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Whether a listener at `address` would be the endpoint itself.
    pub fn is_at(&self, address: SocketAddr) -> bool {
        let port = self.authority.port_u16().unwrap_or(if self.scheme == Scheme::HTTPS { 443 } else { 80 });
        let host = self.authority.host().trim_matches(['[', ']']);
        let is_here = match host.parse::<std::net::IpAddr>() {
            Ok(ip) => ip == address.ip() || ip.is_unspecified() || (address.ip().is_unspecified() && ip.is_loopback()),
            Err(_) => host == "localhost" && (address.ip().is_loopback() || address.ip().is_unspecified()),
        };
        port == address.port() && is_here
    }

    /// Sends a request to the endpoint: its path and query as they are, and its host as the client named it.
    pub async fn send(&self, mut request: Request<Body>) -> Result<Response<Incoming>, Failure> {
        let target = request.uri().path_and_query().cloned().unwrap_or_else(|| PathAndQuery::from_static("/"));
        let uri = Uri::builder().scheme(self.scheme.clone()).authority(self.authority.clone()).path_and_query(target);
        *request.uri_mut() = uri.build().map_err(|error| Failure::Request(error.to_string()))?;
        *request.version_mut() = Version::HTTP_11;
        if !request.headers().contains_key(header::HOST) {
            // HTTP/1.0, which has none, goes on as 1.1, which must.
            let host = HeaderValue::from_str(self.authority.as_str());
            request.headers_mut().insert(header::HOST, host.map_err(|error| Failure::Request(error.to_string()))?);
        }
        let sent = match &self.client {
            Connections::Plain(client) => client.request(request).await,
            Connections::Tls(client) => client.request(request).await,
        };
        sent.map_err(Failure::Connection)
    }
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The request is for no server.
    #[error("the request can't be forwarded: {0}")]
    Request(String),
    /// The endpoint didn't answer.
    #[error("{}", innermost(.0))]
    Connection(#[source] Error),
}

/// The cause, without what was tried.
pub fn innermost(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_known_where_it_would_meet_itself() {
        let at = |endpoint: &str, address: &str| Upstream::new(endpoint).unwrap().is_at(address.parse().unwrap());
        assert!(at("http://127.0.0.1:4566", "127.0.0.1:4566"));
        assert!(at("http://localhost:4566/", "127.0.0.1:4566"));
        assert!(at("http://127.0.0.1:4566", "0.0.0.0:4566"));
        assert!(at("http://[::1]", "[::1]:80"));
        assert!(!at("http://127.0.0.1:5000", "127.0.0.1:4566"));
        assert!(!at("http://198.51.100.7:4566", "127.0.0.1:4566"));
    }
}
