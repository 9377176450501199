//! `--metrics`: who asks `/metrics` gets the status in Prometheus' words. It reads, and changes nothing.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;
use tokio::sync::{Mutex, Semaphore, mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use super::{Event, Reply, control};
use crate::gateway::page;
use crate::metrics;

/// Scrapers at the same time; more wait.
const CONNECTIONS: usize = 16;

/// How long a scraper may take, from its connect to the last byte that it reads.
const LONGEST: Duration = Duration::from_secs(60);

/// How old a page may be. Anybody who reaches the address may ask, and a status takes the daemon's one task some time.
const OLDEST: Duration = Duration::from_secs(1);

/// Listens until shut down.
///
/// # Errors
/// The address can't be had.
pub(super) async fn serve(address: SocketAddr, events: mpsc::Sender<Event>, shutdown: CancellationToken) -> Result<()> {
    let listener = TcpListener::bind(address)
        .await
        .with_context(|| format!("cannot listen on {address} for --metrics; name another address"))?;
    let address = listener.local_addr()?;
    tracing::info!("metrics are at http://{address}/metrics");
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    let pages = Arc::new(Pages { events, last: Mutex::default(), is_local: address.ip().is_loopback() });
    tokio::spawn(shutdown.run_until_cancelled_owned(async move {
        loop {
            let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
            let stream = match listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(%error, "the listener of --metrics does not accept");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let pages = Arc::clone(&pages);
            tokio::spawn(async move {
                let service = service_fn(|request| answer(request, &pages));
                let mut protocol = http1::Builder::new();
                // One request a connection, so that what is slow about it has one bound.
                protocol.keep_alive(false);
                let serving = protocol.serve_connection(TokioIo::new(stream), service);
                match tokio::time::timeout(LONGEST, serving).await {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) => tracing::debug!(%error, "a scraper is gone"),
                    Err(_) => tracing::debug!("a scraper takes longer than {LONGEST:?}"),
                }
                drop(place);
            });
        }
    }));
    Ok(())
}

async fn answer(request: Request<Incoming>, pages: &Pages) -> Result<Response<Full<Bytes>>, Infallible> {
    let (status, kind, text) = match (request.method(), request.uri().path()) {
        _ if pages.is_for_another_site(&request) => {
            (StatusCode::FORBIDDEN, "text/plain", "web pages of other sites may not read this\n".into())
        }
        (&Method::GET, "/metrics") => match pages.figures().await {
            Some(text) => (StatusCode::OK, metrics::CONTENT_TYPE, text),
            None => (StatusCode::SERVICE_UNAVAILABLE, "text/plain", "the agent is shutting down\n".into()),
        },
        (_, "/metrics") => (StatusCode::METHOD_NOT_ALLOWED, "text/plain", "GET it\n".into()),
        _ => (StatusCode::NOT_FOUND, "text/plain", "there is only /metrics\n".into()),
    };
    let mut response = Response::new(Full::from(text));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(kind));
    Ok(response)
}

/// Whom to ask for figures, and those that were told last.
struct Pages {
    events: mpsc::Sender<Event>,
    last: Mutex<Option<(Instant, Bytes)>>,
    /// Whether it is served to this machine alone.
    is_local: bool,
}

impl Pages {
    /// Whether a browser asks for somebody else's web page. Where others may ask, by whatever name they have for this
    /// machine, a page learns nothing that its owner couldn't ask for.
    fn is_for_another_site<B>(&self, request: &Request<B>) -> bool {
        self.is_local && page::foreign(request.method(), request.headers()).is_some()
    }

    /// `None` at the agent's end.
    async fn figures(&self) -> Option<Bytes> {
        // Held while the daemon is asked: who comes meanwhile gets the same.
        let mut last = self.last.lock().await;
        if let Some((_, page)) = last.as_ref().filter(|(asked, _)| asked.elapsed() < OLDEST) {
            return Some(page.clone());
        }
        let asked = Instant::now();
        let (tell, told) = oneshot::channel();
        self.events.send(Event::Asked(control::Request::Status, tell)).await.ok()?;
        let Reply::Status(status) = told.await.ok()? else { return None };
        let page = Bytes::from(metrics::text(*status));
        *last = Some((asked, page.clone()));
        Some(page)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_was_led_here_reads_nothing_of_this_machine() {
        let (events, _inbox) = mpsc::channel(1);
        let mut pages = Pages { events, last: Mutex::default(), is_local: true };
        let request = |host: &str| Request::get("/metrics").header(header::HOST, host).body(()).unwrap();
        for host in ["127.0.0.1:9100", "localhost:9100", "[::1]:9100"] {
            assert!(!pages.is_for_another_site(&request(host)), "{host}");
        }
        assert!(pages.is_for_another_site(&request("evil.example:9100")));
        let mut asked = request("localhost:9100");
        asked.headers_mut().insert("sec-fetch-site", header::HeaderValue::from_static("cross-site"));
        assert!(pages.is_for_another_site(&asked));
        pages.is_local = false;
        assert!(!pages.is_for_another_site(&request("node-1.example:9100")), "a scraper on the network");
    }
}
