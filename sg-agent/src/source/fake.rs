//! An endpoint for tests that answers as it is told and keeps what it was asked.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

/// A request, as far as tests look at it.
#[derive(Clone, Debug)]
pub struct Request {
    pub headers: BTreeMap<String, String>,
    pub form: BTreeMap<String, String>,
}

/// What to answer.
#[derive(Clone, Debug)]
pub struct Reply {
    pub status: u16,
    pub body: Vec<u8>,
    /// Bytes that the header promises and that never come.
    pub missing: usize,
}

pub struct Fake {
    pub url: String,
    requests: Arc<Mutex<Vec<Request>>>,
    server: JoinHandle<()>,
}

impl Reply {
    pub fn ok(body: impl AsRef<[u8]>) -> Self {
        Self::with(200, body)
    }

    pub fn with(status: u16, body: impl AsRef<[u8]>) -> Self {
        Self { status, body: body.as_ref().to_vec(), missing: 0 }
    }

    pub fn error(code: &str) -> Self {
        let errors = format!("<Errors><Error><Code>{code}</Code><Message>said so</Message></Error></Errors>");
        Self::with(400, format!("<Response>{errors}</Response>"))
    }
}

impl Fake {
    /// Answers what `answer` makes of each request, and of how many came before it.
    pub async fn start(answer: impl Fn(&Request, usize) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let requests = Arc::new(Mutex::new(Vec::new()));
        let (kept, answer) = (requests.clone(), Arc::new(answer));
        let server = tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                tokio::spawn(serve(stream, kept.clone(), answer.clone()));
            }
        });
        Self { url, requests, server }
    }

    pub fn requests(&self) -> Vec<Request> {
        self.requests.lock().unwrap().clone()
    }

    /// The actions that were asked for, sorted.
    pub fn actions(&self) -> Vec<String> {
        let mut actions: Vec<String> =
            self.requests().into_iter().map(|request| request.form["Action"].clone()).collect();
        actions.sort();
        actions
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.server.abort();
    }
}

async fn serve(
    mut stream: TcpStream,
    kept: Arc<Mutex<Vec<Request>>>,
    answer: Arc<impl Fn(&Request, usize) -> Reply + Send + Sync>,
) {
    let request = read(&mut stream).await;
    let before = {
        let mut kept = kept.lock().unwrap();
        kept.push(request.clone());
        kept.len() - 1
    };
    let reply = answer(&request, before);
    let length = reply.body.len() + reply.missing;
    let head = format!("HTTP/1.1 {} x\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n", reply.status);
    // A client that has seen enough may be gone.
    let _ = stream.write_all(head.as_bytes()).await;
    let _ = stream.write_all(&reply.body).await;
}

async fn read(stream: &mut TcpStream) -> Request {
    let mut bytes = Vec::new();
    let end = loop {
        stream.read_buf(&mut bytes).await.unwrap();
        if let Some(end) = bytes.windows(4).position(|window| window == b"\r\n\r\n") {
            break end;
        }
    };
    let head = String::from_utf8(bytes[..end].to_vec()).unwrap();
    let headers: BTreeMap<String, String> = head
        .lines()
        .filter_map(|line| line.split_once(": "))
        .map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned()))
        .collect();
    let length: usize = headers["content-length"].parse().unwrap();
    while bytes.len() < end + 4 + length {
        stream.read_buf(&mut bytes).await.unwrap();
    }
    let form = form_urlencoded::parse(&bytes[end + 4..]).into_owned().collect();
    Request { headers, form }
}
