//! Which endpoint, region and account: options first, then the environment and the profile, as the AWS tools take them.
//! Credentials are the signer's.

use std::path::PathBuf;
use std::time::Duration;

use reqwest::Url;

use super::SourceError;
use super::quirks::{self, is_account};

/// The region where none is set; Moto's and LocalStack's too.
const DEFAULT_REGION: &str = "us-east-1";

/// Four times the slowest answer measured: 2.6 s for 1,000 groups of Moto. While an endpoint hangs nothing else is
/// asked, so it is also how soon one that answers again is noticed.
const TIMEOUT: Duration = Duration::from_secs(10);

/// What a user may set; `None` is found as the AWS tools find it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Ec2Options {
    /// The endpoint: `AWS_ENDPOINT_URL_EC2`, `AWS_ENDPOINT_URL`, the profile's `endpoint_url`, or AWS itself.
    pub endpoint: Option<String>,
    /// The region: `AWS_REGION`, `AWS_DEFAULT_REGION`, the profile's, or `us-east-1`.
    pub region: Option<String>,
    /// The account of an emulator that holds several.
    pub account: Option<String>,
    /// How long one call may take, the whole answer included.
    pub timeout: Duration,
    /// Whether an emulator's default groups get the self rule that AWS's have.
    pub add_default_self_rule: bool,
}

impl Default for Ec2Options {
    fn default() -> Self {
        Self { endpoint: None, region: None, account: None, timeout: TIMEOUT, add_default_self_rule: true }
    }
}

/// What the options come to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Settings {
    pub endpoint: Url,
    pub region: String,
    pub account: Option<String>,
    pub emulator: bool,
    pub timeout: Duration,
}

impl Settings {
    /// Resolves the options; `env` and `file` are the environment and the file system.
    pub(super) fn resolve(
        options: &Ec2Options,
        env: impl Fn(&str) -> Option<String>,
        file: impl Fn(&str) -> Option<String>,
    ) -> Result<Self, SourceError> {
        let env = |name: &str| env(name).filter(|value| !value.is_empty());
        let profile = Profile::find(&env, file);
        let region = options.region.clone().or_else(|| env("AWS_REGION")).or_else(|| env("AWS_DEFAULT_REGION"));
        let region = region.or_else(|| profile.get("region")).unwrap_or_else(|| DEFAULT_REGION.to_owned());
        if region.is_empty() || !region.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-') {
            return Err(SourceError::Setting { name: "the region", value: region, expected: "AWS region" });
        }
        let endpoint = options.endpoint.clone().or_else(|| env("AWS_ENDPOINT_URL_EC2"));
        let endpoint = endpoint.or_else(|| env("AWS_ENDPOINT_URL")).or_else(|| profile.get("endpoint_url"));
        let endpoint = endpoint.unwrap_or_else(|| aws_endpoint(&region));
        let bad_url = || SourceError::Setting {
            name: "the endpoint",
            value: without_credentials(&endpoint),
            expected: "http or https URL such as http://127.0.0.1:5000",
        };
        let url: Url = endpoint.parse().map_err(|_| bad_url())?;
        if !matches!(url.scheme(), "http" | "https") || url.host_str().is_none() {
            return Err(bad_url());
        }
        if let Some(account) = &options.account
            && !is_account(account)
        {
            let (name, expected) = ("the account", "number of twelve digits");
            return Err(SourceError::Setting { name, value: account.clone(), expected });
        }
        let emulator = quirks::is_emulator(&url);
        let account = options.account.clone().or_else(|| {
            // LocalStack's convention.
            env("AWS_ACCESS_KEY_ID").filter(|key| emulator && is_account(key))
        });
        Ok(Self { endpoint: url, region, account, emulator, timeout: options.timeout })
    }
}

/// What stands for user and password before a host is nobody's to read, whatever else the text is.
fn without_credentials(url: &str) -> String {
    let Some((before, host)) = url.rsplit_once('@') else { return url.to_owned() };
    let scheme = before.split_once("//").map(|(scheme, _)| format!("{scheme}//"));
    format!("{}***@{host}", scheme.unwrap_or_default())
}

fn aws_endpoint(region: &str) -> String {
    let domain = if region.starts_with("cn-") { "amazonaws.com.cn" } else { "amazonaws.com" };
    format!("https://ec2.{region}.{domain}")
}

/// The section of the shared configuration file that `AWS_PROFILE` names.
struct Profile {
    settings: Vec<(String, String)>,
}

impl Profile {
    fn find(env: &impl Fn(&str) -> Option<String>, file: impl Fn(&str) -> Option<String>) -> Self {
        let path = env("AWS_CONFIG_FILE").or_else(|| env("HOME").map(|home| format!("{home}/.aws/config")));
        let name = env("AWS_PROFILE").or_else(|| env("AWS_DEFAULT_PROFILE")).unwrap_or_else(|| "default".to_owned());
        let text = path.and_then(|path| file(&path)).unwrap_or_default();
        Self { settings: section(&text, &name) }
    }

    fn get(&self, key: &str) -> Option<String> {
        let found = self.settings.iter().find(|(name, value)| name == key && !value.is_empty());
        found.map(|(_, value)| value.clone())
    }
}

/// The files in which the AWS tools look for profiles and credentials, whether they are there or not.
pub fn profile_files() -> Vec<PathBuf> {
    let env = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let home = |file: &str| env("HOME").map(|home| home.join(".aws").join(file));
    let config = env("AWS_CONFIG_FILE").or_else(|| home("config"));
    let credentials = env("AWS_SHARED_CREDENTIALS_FILE").or_else(|| home("credentials"));
    config.into_iter().chain(credentials).collect()
}

fn section(text: &str, profile: &str) -> Vec<(String, String)> {
    let mut inside = false;
    let mut settings = Vec::new();
    for line in text.lines() {
        let trimmed = line.trim();
        if trimmed.starts_with(['#', ';']) {
            continue;
        }
        if let Some(header) = trimmed.strip_prefix('[').and_then(|rest| rest.split(']').next()) {
            let header = header.trim();
            let named = header.strip_prefix("profile ").map(str::trim);
            inside = named == Some(profile) || (profile == "default" && header == "default");
        } else if inside && !line.starts_with([' ', '\t']) {
            // What is indented belongs to a setting of several lines.
            if let Some((key, value)) = trimmed.split_once('=') {
                settings.push((key.trim().to_owned(), value.trim().to_owned()));
            }
        }
    }
    settings
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: &str = "# comment\n[default]\nregion = eu-west-1\n\n[profile dev]\nregion=eu-north-1\n\
                          s3 =\n  endpoint_url = http://s3:1\nendpoint_url = http://moto:5000\n";

    fn resolve(options: Ec2Options, env: &[(&str, &str)]) -> Result<Settings, SourceError> {
        let get = |name: &str| env.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned());
        Settings::resolve(&options, get, |path| (path == "/home/a/.aws/config").then(|| CONFIG.to_owned()))
    }

    #[test]
    fn options_come_before_variables_and_those_before_the_profile() {
        let home = ("HOME", "/home/a");
        let of = |options: Ec2Options, env: &[(&str, &str)]| {
            let settings = resolve(options, env).unwrap();
            (settings.endpoint.to_string(), settings.region, settings.emulator)
        };
        let none = Ec2Options::default;
        assert_eq!(of(none(), &[]), ("https://ec2.us-east-1.amazonaws.com/".into(), "us-east-1".into(), false));
        assert_eq!(of(none(), &[home]), ("https://ec2.eu-west-1.amazonaws.com/".into(), "eu-west-1".into(), false));
        let dev = [home, ("AWS_PROFILE", "dev")];
        assert_eq!(of(none(), &dev), ("http://moto:5000/".into(), "eu-north-1".into(), true));
        let env = [
            home,
            ("AWS_PROFILE", "dev"),
            ("AWS_DEFAULT_REGION", "cn-north-1"),
            ("AWS_ENDPOINT_URL", "http://127.0.0.1:5000"),
        ];
        assert_eq!(of(none(), &env), ("http://127.0.0.1:5000/".into(), "cn-north-1".into(), true));
        let both = [&env[..], &[("AWS_REGION", "us-west-2"), ("AWS_ENDPOINT_URL_EC2", "http://127.0.0.1:6000")]];
        assert_eq!(of(none(), &both.concat()), ("http://127.0.0.1:6000/".into(), "us-west-2".into(), true));
        let options = Ec2Options { endpoint: Some("http://e:1".into()), region: Some("ap-east-1".into()), ..none() };
        assert_eq!(of(options, &both.concat()), ("http://e:1/".into(), "ap-east-1".into(), true));
        assert_eq!(of(none(), &[("AWS_REGION", "cn-north-1")]).0, "https://ec2.cn-north-1.amazonaws.com.cn/");
    }

    #[test]
    fn an_access_key_of_twelve_digits_is_an_emulators_account() {
        let key = ("AWS_ACCESS_KEY_ID", "000000000001");
        let emulator = resolve(Ec2Options::default(), &[key, ("AWS_ENDPOINT_URL", "http://e:1")]).unwrap();
        assert_eq!(emulator.account.as_deref(), Some("000000000001"));
        assert_eq!(resolve(Ec2Options::default(), &[key]).unwrap().account, None);
    }

    #[test]
    fn what_cannot_be_used_is_named() {
        let endpoint = |url: &str| Ec2Options { endpoint: Some(url.into()), ..Default::default() };
        for url in ["127.0.0.1:5000", "ftp://a", "", "unix:/x"] {
            let error = resolve(endpoint(url), &[]).unwrap_err().to_string();
            assert!(error.contains(&format!("{url:?}")) && error.contains("http://127.0.0.1:5000"), "{error}");
        }
        for url in ["ftp://me:secret@a", "me:secret@a", "http://me:sec@ret@", "http://me:secret@a:x"] {
            let error = resolve(endpoint(url), &[]).map(|settings| settings.endpoint).unwrap_err().to_string();
            assert!(error.contains("***@") && !error.contains("sec"), "{error}");
        }
        let account = Ec2Options { account: Some("123".into()), ..Default::default() };
        assert!(resolve(account, &[]).unwrap_err().to_string().contains("twelve digits"));
        let region = Ec2Options { region: Some("a b".into()), ..Default::default() };
        assert!(resolve(region, &[]).unwrap_err().to_string().contains("\"a b\""));
    }
}
