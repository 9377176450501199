//! One request's way to the endpoint and its answer's way back. Bodies are streamed; only a small form is held, to see
//! which action it names, and the answer to a change, until that is enforced.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use http::request::Parts;
use http::{HeaderName, HeaderValue, Method, Request, Response, StatusCode, Version, header};
use http_body_util::{BodyExt as _, Empty, Full};
use hyper::body::{Body as _, Bytes, Incoming};
use quick_xml::events::Event;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use super::classify::{self, Effect};
use super::held::{Held, Room, Unheld};
use super::upstream::{Body, Failure, Upstream};
use super::{Commit, Counts, Extent, Whom, headers, modified, page, rebooted};
use crate::model::InstanceId;
use crate::source::ModifiedRule;

/// The field of an answer that went out before its change was enforced, and how it begins.
const COMMIT: HeaderName = HeaderName::from_static("x-sg-agent-commit");

/// How long the endpoint may take to answer a change whose client is gone.
const LINGER: Duration = Duration::from_secs(30);

/// How long a late answer waits for the rules to be known as stale, which takes milliseconds unless the agent has its
/// hands full.
const NOTED: Duration = Duration::from_millis(100);

/// Forwards to one endpoint.
#[derive(Debug)]
pub struct Forwarder {
    upstream: Upstream,
    commits: mpsc::Sender<Commit>,
    commit_timeout: Duration,
    room: Room,
    counts: Counts,
}

impl Forwarder {
    /// Changes are told to `commits`.
    pub fn new(upstream: Upstream, commits: mpsc::Sender<Commit>, commit_timeout: Duration) -> Self {
        Self { upstream, commits, commit_timeout, room: Room::default(), counts: Counts::default() }
    }

    /// What was counted so far.
    pub fn counts(&self) -> &Counts {
        &self.counts
    }

    /// Where it forwards to.
    pub fn endpoint(&self) -> &str {
        self.upstream.url()
    }

    /// Answers a request: with the endpoint's answer, or with 502 and a line that says why there is none.
    pub async fn answer(self: Arc<Self>, request: Request<Incoming>) -> Response<Body> {
        add(&self.counts.requests);
        if request.method() == Method::CONNECT {
            return told(StatusCode::NOT_IMPLEMENTED, "sg-agent's gateway is no forward proxy".to_owned());
        }
        let (mut head, body) = request.into_parts();
        let form = if classify::wants_form(&head, body.size_hint().exact()) {
            match body.collect().await {
                Ok(form) => Form::Held(form.to_bytes()),
                // Nobody is there to be answered.
                Err(error) => return told(StatusCode::BAD_REQUEST, format!("the request broke off: {error}")),
            }
        } else {
            Form::Streamed(body)
        };
        let effect = classify::effect(&head, form.bytes());
        headers::strip(&mut head.headers);
        match effect {
            Effect::None => match self.upstream.send(Request::from_parts(head, form.into_body())).await {
                Ok(answer) => passed(answer.map(|body| body.boxed())),
                Err(failure) => self.unanswered(&failure),
            },
            Effect::Change(whom, extent) => {
                if let Some(page) = page::foreign(&head.method, &head.headers) {
                    tracing::warn!(page = %page.escape_default(), "a web page may not change anything: refused");
                    let line = "sg-agent's gateway: web pages of other sites may not change anything".to_owned();
                    return told(StatusCode::FORBIDDEN, line);
                }
                add(&self.counts.changes);
                let asked = Asked::of(&head, form.bytes().unwrap_or_default());
                let request = Request::from_parts(head, form.into_body());
                // A task of its own: what the endpoint did is committed, whether or not the client still waits.
                let gone = CancellationToken::new();
                let _guard = gone.clone().drop_guard();
                let changed = tokio::spawn(Arc::clone(&self).change(request, whom, extent, asked, gone));
                match changed.await {
                    Ok(answer) => answer,
                    Err(error) => told(StatusCode::BAD_GATEWAY, format!("sg-agent's gateway failed: {error}")),
                }
            }
        }
    }

    /// A call that may change what is enforced: its answer waits until that is so.
    async fn change(
        self: Arc<Self>,
        request: Request<Body>,
        whom: Whom,
        extent: Extent,
        asked: Asked,
        gone: CancellationToken,
    ) -> Response<Body> {
        let forgotten = async {
            gone.cancelled().await;
            tokio::time::sleep(LINGER).await;
        };
        let answered = tokio::select! {
            answered = self.whole_answer(request) => answered,
            () = forgotten => Err(told(StatusCode::GATEWAY_TIMEOUT, "nobody waits for it any more".to_owned())),
        };
        let done = match &answered {
            Ok((answer, bytes)) if answer.status().is_success() => asked.done_by(bytes),
            _ => Asked::default(),
        };
        // Whatever the status: an error can have changed something, and so can an answer that never came.
        let committed = self.commit(whom, extent, done).await;
        let mut answer = answered.map_or_else(|failed| failed, |(answer, _)| answer);
        match committed {
            Ok(()) => add(&self.counts.committed),
            Err(problem) => {
                let (counter, text) = match &problem {
                    Uncommitted::Late => (&self.counts.late, "late".to_owned()),
                    Uncommitted::Failed(reason) => (&self.counts.failed, format!("failed; {reason}")),
                };
                add(counter);
                tracing::warn!(endpoint = self.endpoint(), "a change is answered before it is enforced: {text}");
                answer.headers_mut().insert(COMMIT, field(&text));
            }
        }
        answer
    }

    /// The endpoint's answer to its last byte: only then has it done all that it does.
    async fn whole_answer(&self, request: Request<Body>) -> Result<(Response<Body>, Bytes), Response<Body>> {
        let answer = self.upstream.send(request).await.map_err(|failure| self.unanswered(&failure))?;
        let (head, body) = answer.into_parts();
        // What a HEAD's answer says of its length is about another one.
        let is_bare = body.is_end_stream();
        let Held { bytes, trailers } = self.room.hold(body).await.map_err(|unheld| self.unheld(&unheld))?;
        let body = match trailers {
            _ if is_bare => Empty::new().map_err(|never| match never {}).boxed(),
            None => whole(bytes.clone()),
            Some(trailers) => Full::new(bytes.clone())
                .with_trailers(std::future::ready(Some(Ok(trailers))))
                .map_err(|never| match never {})
                .boxed(),
        };
        Ok((passed(Response::from_parts(head, body)), bytes))
    }

    /// Has the change read and enforced.
    async fn commit(&self, whom: Whom, extent: Extent, done: Asked) -> Result<(), Uncommitted> {
        let ((reply, told), (known, is_known)) = (oneshot::channel(), oneshot::channel::<()>());
        let Asked { modified, rebooted } = done;
        let commit = Commit { whom, asked: Instant::now(), modified, rebooted, extent, reply, known };
        // In a task of its own: a change that is answered late, because nobody had time to hear of it, is heard of all the
        // same. It is what makes the rules stale, and what it modified may be told by nobody else.
        let commits = self.commits.clone();
        tokio::spawn(async move { commits.send(commit).await });
        let ended = |_| Uncommitted::Failed("the agent is shutting down".to_owned());
        match tokio::time::timeout(self.commit_timeout, told).await {
            Ok(told) => told.map_err(ended)?.map_err(Uncommitted::Failed),
            Err(_) => {
                let _ = tokio::time::timeout(NOTED, is_known).await;
                Err(Uncommitted::Late)
            }
        }
    }

    fn unanswered(&self, failure: &Failure) -> Response<Body> {
        if let Failure::Request(_) = failure {
            return told(StatusCode::BAD_REQUEST, format!("sg-agent's gateway: {failure}"));
        }
        self.broken(&failure.to_string())
    }

    /// An answer that has ended, but can't be passed on: what the call did is committed nevertheless. Not a 502, which the
    /// AWS SDKs answer by the same call once more.
    fn unheld(&self, unheld: &Unheld) -> Response<Body> {
        if let Unheld::Broken(reason) = unheld {
            return self.broken(reason);
        }
        add(&self.counts.unanswered);
        let endpoint = self.endpoint();
        tracing::warn!(endpoint, "the answer to a change isn't passed on: {unheld}");
        let line = format!("sg-agent's gateway: {endpoint} has done it, but {unheld}; ask it what has changed");
        told(StatusCode::INSUFFICIENT_STORAGE, line)
    }

    fn broken(&self, reason: &str) -> Response<Body> {
        add(&self.counts.unanswered);
        let endpoint = self.endpoint();
        tracing::debug!(endpoint, reason, "the endpoint did not answer a client of the gateway");
        told(
            StatusCode::BAD_GATEWAY,
            format!("sg-agent's gateway: {endpoint} does not answer: {reason}; is it running?"),
        )
    }
}

/// What a call asks for that no later answer of the endpoint shows.
#[derive(Default)]
struct Asked {
    modified: Vec<ModifiedRule>,
    rebooted: Vec<InstanceId>,
}

impl Asked {
    /// What a form asks for, where nothing else in the request can mean something else to the endpoint.
    fn of(head: &Parts, form: &[u8]) -> Self {
        let is_plain = head.uri.query().is_none_or(str::is_empty) && !head.headers.contains_key("x-amz-target");
        if !is_plain || form_urlencoded::parse(form).filter(|(name, _)| name == "Action").count() != 1 {
            return Self::default();
        }
        Self { modified: modified::rules(form), rebooted: rebooted::instances(form) }
    }

    /// What of it was done: only the endpoint's own answer tells which action it took the request for.
    fn done_by(self, answer: &[u8]) -> Self {
        let root = root(answer);
        let is = |action: &str| root.as_deref() == Some(action);
        Self {
            modified: if is("ModifySecurityGroupRulesResponse") { self.modified } else { Vec::new() },
            rebooted: if is("RebootInstancesResponse") { self.rebooted } else { Vec::new() },
        }
    }
}

/// The name of an XML document's outermost element.
fn root(answer: &[u8]) -> Option<String> {
    let mut reader = quick_xml::Reader::from_reader(answer);
    loop {
        match reader.read_event().ok()? {
            Event::Start(element) => return Some(element.local_name().as_ref().to_owned()),
            Event::Eof => return None,
            _ => {}
        }
    }
}

/// Why a change isn't known to be enforced.
enum Uncommitted {
    /// It took too long.
    Late,
    /// It can't be.
    Failed(String),
}

/// A request's body.
enum Form {
    /// Looked into.
    Held(Bytes),
    /// Passed on as it comes.
    Streamed(Incoming),
}

impl Form {
    fn bytes(&self) -> Option<&[u8]> {
        match self {
            Self::Held(bytes) => Some(bytes),
            Self::Streamed(_) => None,
        }
    }

    fn into_body(self) -> Body {
        match self {
            Self::Held(bytes) => whole(bytes),
            Self::Streamed(body) => body.boxed(),
        }
    }
}

fn whole(bytes: Bytes) -> Body {
    Full::new(bytes).map_err(|never| match never {}).boxed()
}

/// The endpoint's answer, on another connection.
fn passed(mut answer: Response<Body>) -> Response<Body> {
    headers::strip(answer.headers_mut());
    *answer.version_mut() = Version::HTTP_11;
    answer
}

/// An answer of the gateway's own.
fn told(status: StatusCode, line: String) -> Response<Body> {
    let mut answer = Response::new(whole(Bytes::from(line + "\n")));
    *answer.status_mut() = status;
    answer.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    answer
}

/// A text as a field's value: one line of plain characters, and not too many.
fn field(text: &str) -> HeaderValue {
    let plain: String =
        text.chars().map(|c| if c.is_ascii_graphic() || c == ' ' { c } else { '?' }).take(512).collect();
    HeaderValue::from_str(&plain).unwrap_or(HeaderValue::from_static("failed"))
}

fn add(counter: &AtomicU64) {
    counter.fetch_add(1, Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(uri: &str, form: &str) -> Asked {
        let head = http::Request::builder().uri(uri).body(()).unwrap().into_parts().0;
        Asked::of(&head, form.as_bytes())
    }

    #[test]
    fn only_what_the_endpoint_says_it_did_was_done() {
        let form = "Action=ModifySecurityGroupRules&GroupId=sg-1&SecurityGroupRule.1.SecurityGroupRuleId=sgr-1\
                    &SecurityGroupRule.1.SecurityGroupRule.CidrIpv4=0.0.0.0/0";
        let done = |root: &str| {
            let answer = format!("<?xml version=\"1.0\"?><{root} xmlns=\"urn:x\"><return>true</return></{root}>");
            asked("/", form).done_by(answer.as_bytes()).modified.len()
        };
        assert_eq!(done("ModifySecurityGroupRulesResponse"), 1);
        assert_eq!(done("ListAllMyBucketsResult"), 0, "the endpoint took it for another call");
        assert_eq!(asked("/", form).done_by(b"true").modified.len(), 0);
        assert_eq!(asked("/?Action=DescribeRegions", form).modified.len(), 0);
        assert_eq!(asked("/", &format!("{form}&Action=DescribeRegions")).modified.len(), 0);
    }
}
