//! `--metrics`: who asks `/metrics` gets the status in Prometheus' words. It reads, and changes nothing.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use super::{Event, Reply, control};
use crate::metrics;

/// Scrapers at the same time; more wait.
const CONNECTIONS: usize = 16;

/// How long a scraper may take to ask, also the second time.
const LONGEST_HEAD: Duration = Duration::from_secs(60);

/// Listens until shut down.
///
/// # Errors
/// The address can't be had.
pub(super) async fn serve(address: SocketAddr, events: mpsc::Sender<Event>, shutdown: CancellationToken) -> Result<()> {
    let listener = TcpListener::bind(address)
        .await
        .with_context(|| format!("cannot listen on {address} for --metrics; name another address"))?;
    tracing::info!("metrics are at http://{}/metrics", listener.local_addr()?);
    let places = Arc::new(Semaphore::new(CONNECTIONS));
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
            let events = events.clone();
            tokio::spawn(async move {
                let service = service_fn(|request| answer(request, &events));
                let mut protocol = http1::Builder::new();
                protocol.timer(TokioTimer::new()).header_read_timeout(LONGEST_HEAD);
                if let Err(error) = protocol.serve_connection(TokioIo::new(stream), service).await {
                    tracing::debug!(%error, "a scraper is gone");
                }
                drop(place);
            });
        }
    }));
    Ok(())
}

async fn answer(request: Request<Incoming>, events: &mpsc::Sender<Event>) -> Result<Response<Full<Bytes>>, Infallible> {
    let (status, kind, text) = match (request.method(), request.uri().path()) {
        (&Method::GET, "/metrics") => match figures(events).await {
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

/// `None` at the agent's end.
async fn figures(events: &mpsc::Sender<Event>) -> Option<String> {
    let (tell, told) = oneshot::channel();
    events.send(Event::Asked(control::Request::Status, tell)).await.ok()?;
    match told.await.ok()? {
        Reply::Status(status) => Some(metrics::text(*status)),
        _ => None,
    }
}
