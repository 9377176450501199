//! A real Moto server, asked by the real AWS CLI or, where a test has much to set up, by the plain protocol. One for all
//! tests of a program: it takes seconds to start, and the agent asks only for its own instances.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::namespace::{command_in, ends_with_this_thread};
use super::{Agent, Namespace, free_port, run, unique};

/// How long it may take until it answers; importing it takes seconds on a slow disk.
const START: Duration = Duration::from_secs(300);
/// An image that Moto knows from its start.
const AMI: &str = "ami-12c6146b";
/// Where tests are that don't say otherwise.
const REGION: &str = "us-east-1";
/// Any credentials will do, but there must be some.
const CREDENTIALS: [(&str, &str); 4] = [
    ("AWS_ACCESS_KEY_ID", "test"),
    ("AWS_SECRET_ACCESS_KEY", "test"),
    ("AWS_REGION", REGION),
    ("AWS_DEFAULT_REGION", REGION),
];

/// A Moto that answers, or a way to one. It ends with the program.
#[derive(Debug)]
pub struct Moto {
    address: SocketAddr,
    region: String,
    /// Where calls are made from, if it isn't the test's own namespace.
    from: Option<Namespace>,
    /// Its process, if this is the one that started it.
    process: Mutex<Option<Pid>>,
}

impl Moto {
    /// The one of this program.
    ///
    /// # Panics
    /// When it can't be started.
    pub fn shared() -> &'static Self {
        static MOTO: OnceLock<Moto> = OnceLock::new();
        MOTO.get_or_init(Self::own)
    }

    /// One of the test's own, to be stopped or reset.
    ///
    /// # Panics
    /// When it can't be started.
    pub fn own() -> Self {
        let address = (Ipv4Addr::LOCALHOST, free_port()).into();
        let moto = Self { address, region: REGION.to_owned(), from: None, process: Mutex::new(None) };
        moto.restart();
        moto
    }

    /// One on loopback of a namespace.
    ///
    /// # Panics
    /// When it can't be started.
    pub fn inside(namespace: &Namespace) -> Self {
        let address = (Ipv4Addr::LOCALHOST, free_port()).into();
        let from = Some(namespace.again());
        let moto = Self { address, region: REGION.to_owned(), from, process: Mutex::new(None) };
        moto.restart();
        moto
    }

    /// The same by another way: through a gateway, as seen from a namespace.
    pub fn through(&self, gateway: SocketAddr, from: &Namespace) -> Self {
        Self { address: gateway, region: self.region.clone(), from: Some(from.again()), process: Mutex::new(None) }
    }

    /// Starts its process, which knows nothing yet.
    ///
    /// # Panics
    /// When it can't be started, or doesn't answer.
    pub fn restart(&self) {
        self.stop();
        let address = self.address;
        let python = venv("SG_MOTO_PYTHON", "python");
        let log = std::env::temp_dir().join(format!("{}-moto.log", unique()));
        let (tell, told) = mpsc::channel();
        let (announce, announced) = mpsc::channel();
        let place = self.from.as_ref().map(Namespace::handle);
        // Its parent is a thread that lives as long as the program: with that Moto ends, however that ends.
        thread::spawn(move || {
            let out = std::fs::File::create(&log).expect("a log file");
            // Nobody needs its name any more; the file goes with its last user.
            let _ = std::fs::remove_file(&log);
            let mut command = match &place {
                Some(namespace) => command_in(namespace, &python),
                None => Command::new(&python),
            };
            command.args(["-m", "moto.server", "-H", "127.0.0.1", "-p", &address.port().to_string()]);
            command.stdin(Stdio::null()).stderr(out.try_clone().expect("one more open file")).stdout(out);
            ends_with_this_thread(&mut command);
            let started = command.spawn().map_err(|error| format!("{}: {error}", python.display()));
            let child = started.map_err(|error| drop(tell.send(error)));
            if let Ok(mut child) = child {
                let _ = announce.send(child.id());
                let ended = child.wait();
                let _ = tell.send(format!("moto.server ended: {ended:?}"));
            }
        });
        let end = Instant::now() + START;
        while !self.answers() {
            if let Ok(problem) = told.recv_timeout(Duration::from_millis(100)) {
                panic!("no Moto: {problem}");
            }
            assert!(Instant::now() < end, "Moto doesn't answer within {START:?}");
        }
        let pid = announced.recv().ok().and_then(|pid| i32::try_from(pid).ok());
        *self.process() = pid.map(Pid::from_raw);
    }

    /// Ends its process, at once.
    pub fn stop(&self) {
        if let Some(pid) = self.process().take() {
            let _ = kill(pid, Signal::SIGKILL);
            while self.connect().is_ok() {
                thread::sleep(Duration::from_millis(5));
            }
        }
    }

    fn process(&self) -> MutexGuard<'_, Option<Pid>> {
        self.process.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One of Moto's own controls, such as `reset` and `seed?a=1`.
    ///
    /// # Panics
    /// When it doesn't answer 200.
    #[track_caller]
    pub fn control(&self, what: &str) -> String {
        let host = self.address;
        let answer = self.ask(&format!("POST /moto-api/{what} HTTP/1.0\r\nHost: {host}\r\nContent-Length: 0\r\n\r\n"));
        match answer {
            Ok(answer) if answer.split(' ').nth(1) == Some("200") => answer,
            answer => panic!("{what}: {answer:?}"),
        }
    }

    /// The same in a region of the caller's own, where nobody else's instances are.
    #[must_use]
    pub fn in_region(&self, region: &str) -> Self {
        Self { address: self.address, region: region.to_owned(), from: None, process: Mutex::new(None) }
    }

    fn credentials(&self) -> [(&'static str, &str); 4] {
        CREDENTIALS.map(|(name, value)| (name, if value == REGION { &*self.region } else { value }))
    }

    /// Where it is.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Its URL.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Makes an agent read from here, or from what stands before it at `url`.
    pub fn serve(&self, agent: &mut Agent, url: &str) {
        Self::reach(agent, url);
        for (name, value) in self.credentials() {
            agent.environment(name, value);
        }
        // Agents of other tests would want the gateway's port as well.
        agent.arguments(["--poll-interval", "0.2", "--no-gateway"]);
    }

    /// Makes an agent read from `url`, however often it does.
    pub fn reach(agent: &mut Agent, url: &str) {
        for (name, value) in CREDENTIALS {
            agent.environment(name, value);
        }
        agent.arguments(["--endpoint-url", url]);
    }

    /// `aws ec2 ...` with the real CLI; what it prints as text.
    ///
    /// # Panics
    /// When it fails.
    #[track_caller]
    pub fn aws(&self, arguments: &[&str]) -> String {
        let mut aws = Command::new(venv("SG_AWS", "aws"));
        // The user's own account has nothing to do with it.
        for name in ["AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_EC2"] {
            aws.env_remove(name);
        }
        aws.env("AWS_CONFIG_FILE", "/dev/null").env("AWS_SHARED_CREDENTIALS_FILE", "/dev/null").env("AWS_PAGER", "");
        aws.envs(self.credentials()).env("AWS_ENDPOINT_URL", self.url());
        run(aws.arg("ec2").args(arguments).stdin(Stdio::null()))
    }

    /// One call of the EC2 Query API; the answer's XML.
    ///
    /// # Panics
    /// When the answer isn't 200.
    #[track_caller]
    pub fn call(&self, action: &str, parameters: &[(&str, &str)]) -> String {
        match self.answer(("test", &self.region), action, parameters) {
            Ok(answer) if answer.split(' ').nth(1) == Some("200") => answer,
            answer => panic!("{action} {parameters:?}: {answer:?}"),
        }
    }

    /// The same with another access key, or account, and region, and whatever the answer is, its head included.
    ///
    /// # Errors
    /// Nobody answers.
    pub fn answer(
        &self,
        (key, region): (&str, &str),
        action: &str,
        parameters: &[(&str, &str)],
    ) -> std::io::Result<String> {
        let mut body = format!("Action={action}&Version=2016-11-15");
        for (name, value) in parameters {
            body += &format!("&{name}={}", escape(value));
        }
        let is_account = key.len() == 12 && key.bytes().all(|byte| byte.is_ascii_digit());
        let account = if is_account { format!("x-moto-account-id: {key}\r\n") } else { String::new() };
        // Without a signature Moto takes it for a call of S3; it verifies none.
        let request = format!(
            "POST / HTTP/1.0\r\nHost: {}\r\n{account}Content-Type: application/x-www-form-urlencoded\r\n\
             Authorization: AWS4-HMAC-SHA256 Credential={key}/20260101/{region}/ec2/aws4_request\r\n\
             Content-Length: {}\r\n\r\n{body}",
            self.address,
            body.len()
        );
        self.ask(&request)
    }

    /// Makes a security group without an ingress rule; its id. Names are this program's own.
    #[track_caller]
    pub fn group(&self) -> String {
        let name = unique();
        element(&self.call("CreateSecurityGroup", &[("GroupName", &name), ("GroupDescription", &name)]), "groupId")
    }

    /// Adds an ingress rule for TCP, from a network, a group or a prefix list.
    #[track_caller]
    pub fn authorize(&self, group: &str, port: u16, peer: &str) {
        self.change_ingress("AuthorizeSecurityGroupIngress", group, port, peer);
    }

    /// Takes it away.
    #[track_caller]
    pub fn revoke(&self, group: &str, port: u16, peer: &str) {
        self.change_ingress("RevokeSecurityGroupIngress", group, port, peer);
    }

    #[track_caller]
    fn change_ingress(&self, action: &str, group: &str, port: u16, peer: &str) {
        let key = match peer {
            _ if peer.starts_with("sg-") => "IpPermissions.1.Groups.1.GroupId",
            _ if peer.starts_with("pl-") => "IpPermissions.1.PrefixListIds.1.PrefixListId",
            _ if peer.contains(':') => "IpPermissions.1.Ipv6Ranges.1.CidrIpv6",
            _ => "IpPermissions.1.IpRanges.1.CidrIp",
        };
        let port = port.to_string();
        let (from, to) = (("IpPermissions.1.FromPort", &*port), ("IpPermissions.1.ToPort", &*port));
        self.call(action, &[("GroupId", group), ("IpPermissions.1.IpProtocol", "tcp"), from, to, (key, peer)]);
    }

    /// Runs an instance in these groups; its id.
    #[track_caller]
    pub fn instance(&self, groups: &[&str]) -> String {
        let numbered: Vec<_> = (1..).map(|number| format!("SecurityGroupId.{number}")).zip(groups).collect();
        let mut parameters = vec![("ImageId", AMI), ("MinCount", "1"), ("MaxCount", "1")];
        parameters.extend(numbered.iter().map(|(name, group)| (name.as_str(), **group)));
        element(&self.call("RunInstances", &parameters), "instanceId")
    }

    /// Runs so many instances in one group; their ids.
    #[track_caller]
    pub fn instances(&self, count: usize, group: &str) -> Vec<String> {
        let count = count.to_string();
        let parameters = [("ImageId", AMI), ("MinCount", &*count), ("MaxCount", &*count), ("SecurityGroupId.1", group)];
        let answer = self.call("RunInstances", &parameters);
        let ids = answer.split("<instanceId>").skip(1).filter_map(|rest| rest.split_once('<'));
        let ids: std::collections::BTreeSet<&str> = ids.map(|(id, _)| id).collect();
        ids.into_iter().map(str::to_owned).collect()
    }

    fn answers(&self) -> bool {
        self.ask("HEAD /moto-api/ HTTP/1.0\r\n\r\n").is_ok_and(|answer| answer.split(' ').nth(1) == Some("200"))
    }

    fn connect(&self) -> std::io::Result<TcpStream> {
        let connect = || TcpStream::connect_timeout(&self.address, Duration::from_secs(2));
        self.from.as_ref().map_or_else(connect, |namespace| namespace.run(connect))
    }

    fn ask(&self, request: &str) -> std::io::Result<String> {
        let mut socket = self.connect()?;
        socket.set_read_timeout(Some(Duration::from_secs(30)))?;
        socket.write_all(request.as_bytes())?;
        let mut answer = String::new();
        socket.read_to_string(&mut answer)?;
        Ok(answer)
    }
}

impl Drop for Moto {
    fn drop(&mut self) {
        self.stop();
    }
}

/// The text of the first element of this name.
///
/// # Panics
/// When there is none.
#[track_caller]
pub fn element(xml: &str, name: &str) -> String {
    let found = xml.split_once(&format!("<{name}>")).and_then(|(_, rest)| rest.split_once("</"));
    found.unwrap_or_else(|| panic!("no <{name}> in {xml}")).0.to_owned()
}

fn escape(value: &str) -> String {
    let plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"-_.".contains(byte);
    value.bytes().map(|byte| if plain(&byte) { char::from(byte).into() } else { format!("%{byte:02X}") }).collect()
}

/// A program of the virtual environment that `cargo xtask test` makes.
fn venv(variable: &str, program: &str) -> PathBuf {
    let own = || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../target/venv/bin").join(program);
    let path = std::env::var_os(variable).map_or_else(own, PathBuf::from);
    assert!(path.exists(), "{} isn't there: run 'cargo xtask test', or set {variable}", path.display());
    path
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_and_answers_are_what_ec2_speaks() {
        assert_eq!(escape("10.0.0.0/8 ::"), "10.0.0.0%2F8%20%3A%3A");
        assert_eq!(element("<a><groupId>sg-1</groupId><groupId>sg-2</groupId></a>", "groupId"), "sg-1");
    }
}
