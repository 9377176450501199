//! One call of the EC2 Query API: signed, bounded, paged and, when throttled, tried again. Owns the transport and its
//! errors; which calls are made is `ec2`'s.

#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::time::Duration;

use http::{HeaderValue, header};
use reqsign::aws::{Credential, DefaultCredentialProvider, RequestSigner, StaticCredentialProvider};
use reqsign::{Context, OsEnv, ProvideCredential, Signer, default_context};
use reqsign_command_execute_tokio::TokioCommandExecute;
use reqsign_file_read_tokio::TokioFileRead;
use reqwest::Url;
use tokio::sync::Semaphore;

use super::answer::{self, AnswerError, Call};
use super::settings::Settings;
use super::{SourceError, quirks};

/// The API's version, the only one since 2016.
const VERSION: &str = "2016-11-15";

/// Far above 1,000 groups of 20 rules, 4.3 MB.
const BODY_LIMIT: usize = 64 << 20;

/// Calls at once: Moto answers no faster for more, and others use it too.
const CONCURRENT: usize = 3;

/// Calls of one request that is throttled, the first included.
const ATTEMPTS: u32 = 6;

/// The longest pause after the first throttled call, half of which is left to chance; each next one is twice as long.
const BACK_OFF: Duration = Duration::from_millis(200);

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// The parameters of a call, beside its action and version.
pub type Parameters = Vec<(String, String)>;

/// One endpoint, as one account in one region.
#[derive(Debug)]
pub struct Client {
    http: reqwest::Client,
    signer: Signer<Credential>,
    endpoint: Url,
    account: Option<HeaderValue>,
    slots: Semaphore,
    back_off: Duration,
    body_limit: usize,
}

enum Failure {
    Throttled(String),
    Final(SourceError),
}

impl Client {
    /// Connects to nothing yet.
    pub fn new(settings: &Settings) -> Result<Self, SourceError> {
        let http = reqwest::Client::builder()
            .timeout(settings.timeout)
            .connect_timeout(CONNECT_TIMEOUT)
            .redirect(reqwest::redirect::Policy::none());
        // Without TLS, a machine without CA certificates (a bare container) does as well.
        let http = if settings.endpoint.scheme() == "http" { http.tls_certs_only([]) } else { http };
        let http = http.build().map_err(SourceError::Client)?;
        let account = settings.account.as_deref().filter(|_| settings.emulator);
        let request_signer = RequestSigner::new("ec2", &settings.region);
        let signer = match account {
            Some(account) => {
                let key = StaticCredentialProvider::new(account, quirks::DUMMY_SECRET_KEY);
                Signer::new(local_context(), key, request_signer)
            }
            None if settings.emulator => Signer::new(local_context(), EmulatorCredentials::default(), request_signer),
            None => Signer::new(default_context(), DefaultCredentialProvider::new(), request_signer),
        };
        let account = account.and_then(|account| HeaderValue::from_str(account).ok());
        let slots = Semaphore::new(CONCURRENT);
        Ok(Self {
            http,
            signer,
            endpoint: settings.endpoint.clone(),
            account,
            slots,
            back_off: BACK_OFF,
            body_limit: BODY_LIMIT,
        })
    }

    /// Makes the call and follows its pages.
    pub async fn all<C: Call>(&self, parameters: Parameters) -> Result<Vec<C::Item>, SourceError> {
        let mut items = Vec::new();
        let mut seen = BTreeSet::new();
        let mut token: Option<String> = None;
        loop {
            let (page, next) = self.page::<C>(&parameters, token.as_deref()).await?;
            items.extend(page);
            match next {
                None => return Ok(items),
                Some(next) if !seen.insert(next.clone()) => {
                    return Err(SourceError::EndlessPages { action: C::ACTION, url: self.url(), token: next });
                }
                next => token = next,
            }
        }
    }

    async fn page<C: Call>(
        &self,
        parameters: &Parameters,
        token: Option<&str>,
    ) -> Result<(Vec<C::Item>, Option<String>), SourceError> {
        let token = token.map(|token| ("NextToken", token));
        let body = form_urlencoded::Serializer::new(String::new())
            .append_pair("Action", C::ACTION)
            .append_pair("Version", VERSION)
            .extend_pairs(parameters)
            .extend_pairs(token)
            .finish();
        let mut pause = self.back_off;
        let mut attempt = 0;
        loop {
            attempt += 1;
            match self.attempt::<C>(&body).await {
                Ok(page) => return Ok(page),
                Err(Failure::Final(error)) => return Err(error),
                Err(Failure::Throttled(reason)) if attempt == ATTEMPTS => {
                    let (action, url) = (C::ACTION, self.url());
                    return Err(SourceError::Throttled { action, url, attempts: attempt, reason });
                }
                Err(Failure::Throttled(reason)) => {
                    tracing::debug!(action = C::ACTION, attempt, ?pause, reason, "throttled");
                    // Not all of it: those that were throttled together mustn't come back together.
                    tokio::time::sleep(pause.mul_f64(fastrand::f64().mul_add(0.5, 0.5))).await;
                    pause *= 2;
                }
            }
        }
    }

    async fn attempt<C: Call>(&self, body: &str) -> Result<(Vec<C::Item>, Option<String>), Failure> {
        let answered = {
            // Held for one exchange, not while a throttled call waits. It is never closed.
            let _slot = self.slots.acquire().await;
            self.exchange(C::ACTION, body).await.map_err(Failure::Final)?
        };
        let (status, bytes) = answered;
        answer::read::<C>(status, &bytes).map_err(|problem| match &problem {
            AnswerError::Refused { code, .. } if is_throttling(code) => Failure::Throttled(problem.to_string()),
            _ if matches!(status, 429 | 503) => Failure::Throttled(problem.to_string()),
            _ => {
                let hint = hint(&problem);
                Failure::Final(SourceError::Answer { action: C::ACTION, url: self.url(), problem, hint })
            }
        })
    }

    async fn exchange(&self, action: &'static str, body: &str) -> Result<(u16, Vec<u8>), SourceError> {
        let request = self.signed(action, body).await?;
        let unreachable =
            |error: reqwest::Error| SourceError::Unreachable { action, url: self.url(), reason: innermost(&error) };
        let mut response = self.http.execute(request).await.map_err(unreachable)?;
        let status = response.status().as_u16();
        let mut bytes = Vec::new();
        loop {
            match response.chunk().await {
                Ok(None) => return Ok((status, bytes)),
                Ok(Some(chunk)) if bytes.len() + chunk.len() > self.body_limit => {
                    return Err(SourceError::TooLarge { action, url: self.url(), limit: self.body_limit });
                }
                Ok(Some(chunk)) => bytes.extend_from_slice(&chunk),
                Err(error) => {
                    let (received, reason) = (bytes.len(), innermost(&error));
                    return Err(SourceError::BrokenOff { action, url: self.url(), received, reason });
                }
            }
        }
    }

    async fn signed(&self, action: &'static str, body: &str) -> Result<reqwest::Request, SourceError> {
        let failed = |reason: String| SourceError::Credentials { action, url: self.url(), reason };
        let mut request = http::Request::post(self.endpoint.as_str())
            .header(header::CONTENT_TYPE, "application/x-www-form-urlencoded; charset=utf-8")
            // Without it the signer signs UNSIGNED-PAYLOAD, which only S3 takes.
            .header("x-amz-content-sha256", reqsign::hash::hex_sha256(body.as_bytes()));
        if let Some(account) = &self.account {
            request = request.header(quirks::ACCOUNT_HEADER, account);
        }
        let (mut head, ()) = request.body(()).map_err(|error| failed(error.to_string()))?.into_parts();
        self.signer.sign(&mut head, None).await.map_err(|error| failed(error.to_string()))?;
        let request = http::Request::from_parts(head, body.to_owned());
        reqwest::Request::try_from(request).map_err(|error| failed(error.to_string()))
    }

    /// The endpoint.
    pub fn url(&self) -> String {
        let mut shown = self.endpoint.clone();
        // Fails for URLs without a host only, which this one has.
        let _ = shown.set_username("").and_then(|()| shown.set_password(None));
        shown.to_string()
    }
}

/// Where an emulator's credentials are looked for: the environment and the profile's files. Not over the network, for
/// which reqsign's own client would need CA certificates that a bare container doesn't have.
fn local_context() -> Context {
    Context::new().with_env(OsEnv).with_file_read(TokioFileRead).with_command_execute(TokioCommandExecute)
}

/// What the tools find, and a dummy where they find nothing: emulators take any. The metadata service isn't asked: on
/// a developer's machine it takes seconds to find that there is none.
#[derive(Debug)]
struct EmulatorCredentials(DefaultCredentialProvider);

impl Default for EmulatorCredentials {
    fn default() -> Self {
        Self(DefaultCredentialProvider::builder().no_imds().build())
    }
}

impl ProvideCredential for EmulatorCredentials {
    type Credential = Credential;

    async fn provide_credential(&self, context: &Context) -> reqsign::Result<Option<Credential>> {
        if let Some(found) = self.0.provide_credential(context).await? {
            return Ok(Some(found));
        }
        tracing::info!(access_key = quirks::DUMMY_ACCESS_KEY, "no AWS credentials found; emulators take dummy ones");
        Ok(Some(Credential {
            access_key_id: quirks::DUMMY_ACCESS_KEY.to_owned(),
            secret_access_key: quirks::DUMMY_SECRET_KEY.to_owned(),
            ..Default::default()
        }))
    }
}

/// The codes that AWS's SDKs take for throttling, as far as EC2 has them.
fn is_throttling(code: &str) -> bool {
    matches!(code, "RequestLimitExceeded" | "Throttling" | "ThrottlingException" | "ServiceUnavailable" | "Unavailable")
}

fn hint(problem: &AnswerError) -> &'static str {
    match problem {
        AnswerError::Refused { code, .. } => match code.as_str() {
            "AuthFailure" | "UnauthorizedOperation" | "InvalidClientTokenId" | "SignatureDoesNotMatch" => {
                "check the credentials, and that they may Describe EC2"
            }
            _ => "see the EC2 API's error codes",
        },
        AnswerError::NotXml { .. } => "the server's log tells why, if it is an EC2 endpoint at all",
        AnswerError::WrongRoot { .. } => "is the endpoint URL that of EC2?",
        AnswerError::Malformed(_) => "it is tried again with the next read",
    }
}

/// reqwest's own message repeats the URL and hides the cause behind it.
fn innermost(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}
