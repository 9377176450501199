//! Which ports of launched instances are published, and at which ports of the host: by the rules that are in force, at
//! numbers that an instance keeps for its life. Owns the numbers and their file; listens to nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, Write as _};
use std::net::{Ipv4Addr, TcpListener};
use std::ops::RangeInclusive;
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use crate::apply::Snapshot;
use crate::model::{InstanceId, Traffic, Warning};
use crate::proxy::{PublishSpec, Transport};
use crate::resolve::{Peers, Spec};

/// Right below the ports that Linux gives to clients (`net.ipv4.ip_local_port_range`).
pub const DEFAULT_RANGE: RangeInclusive<u16> = 32_000..=32_767;

/// A rule of more ports than this is published for those that the image exposes, and 22.
const MOST_OF_A_RULE: u16 = 16;

/// No instance gets more ports of the host than this, whatever its rules and its image say.
const MOST_OF_AN_INSTANCE: usize = 64;

/// What every image is taken to expose.
const SSH: u16 = 22;

/// What an instance's tags with its ports begin with; the instance's port follows, and the value is the host's.
const TAG: &str = "dev.sg-agent.port.";

/// EC2 has room for 50 tags.
const MOST_TAGS: usize = 40;

/// An instance's ports, and the host's that stand for them.
type Given = BTreeMap<u16, u16>;

/// The ports of all launched instances.
#[derive(Debug)]
pub(super) struct Ports {
    path: PathBuf,
    range: RangeInclusive<u16>,
    given: BTreeMap<InstanceId, Given>,
    /// Instances that a port could not be had for.
    short: BTreeSet<(InstanceId, u16)>,
    /// Instances that have as many as one gets, and how many they lack.
    full: BTreeMap<InstanceId, usize>,
    unsaved: Option<String>,
}

impl Ports {
    /// Takes up what an earlier agent gave. A file that can't be read is none: ports are given anew.
    pub(super) fn load(directory: &Path, range: RangeInclusive<u16>) -> Self {
        let path = directory.join("ports.json");
        let given = match fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text).unwrap_or_else(|error| {
                tracing::warn!(file = %path.display(), %error, "cannot be read: launched instances get new ports");
                BTreeMap::new()
            }),
            Err(error) => {
                if error.kind() != io::ErrorKind::NotFound {
                    tracing::warn!(file = %path.display(), %error, "cannot be read: launched instances get new ports");
                }
                BTreeMap::new()
            }
        };
        Self { path, range, given, short: BTreeSet::new(), full: BTreeMap::new(), unsaved: None }
    }

    /// Gives ports to what the rules allow, and takes none away: who is denied a published port gets that port's
    /// answer, and a rule that comes back finds the number that it had. Only an instance that has as many as one gets
    /// gives back what it needs no more.
    pub(super) fn update(&mut self, wanted: &BTreeMap<InstanceId, BTreeSet<u16>>) {
        let before = self.given.clone();
        self.short.clear();
        self.full.clear();
        for (instance, ports) in wanted {
            for &port in ports {
                if self.given.get(instance).is_some_and(|given| given.contains_key(&port)) {
                    continue;
                }
                if !self.has_room(instance, ports) {
                    *self.full.entry(instance.clone()).or_default() += 1;
                    continue;
                }
                match self.free(port) {
                    Some(host_port) => {
                        self.given.entry(instance.clone()).or_default().insert(port, host_port);
                    }
                    None => {
                        self.short.insert((instance.clone(), port));
                    }
                }
            }
        }
        self.save(&before);
    }

    /// Whether an instance may get one port more; room is made at the cost of one that isn't wanted.
    fn has_room(&mut self, instance: &InstanceId, wanted: &BTreeSet<u16>) -> bool {
        let Some(given) = self.given.get_mut(instance).filter(|given| given.len() >= MOST_OF_AN_INSTANCE) else {
            return true;
        };
        let unwanted = given.keys().find(|port| !wanted.contains(port)).copied();
        unwanted.is_some_and(|port| given.remove(&port).is_some())
    }

    /// Takes back the ports of instances that are no more.
    pub(super) fn keep(&mut self, live: impl Fn(&InstanceId) -> bool) {
        let before = self.given.clone();
        self.given.retain(|instance, _| live(instance));
        self.save(&before);
    }

    /// The host's port for a port: 22 is 32022, or the next that is free.
    fn free(&self, port: u16) -> Option<u16> {
        let (first, last) = (*self.range.start(), *self.range.end());
        let size = u32::from(last) - u32::from(first) + 1;
        let taken: BTreeSet<u16> = self.given.values().flat_map(BTreeMap::values).copied().collect();
        (0..size)
            .map(|step| first + u16::try_from((u32::from(port) + step) % size).unwrap_or_default())
            .find(|candidate| !taken.contains(candidate) && is_free(*candidate))
    }

    /// What the proxy is to publish.
    pub(super) fn published(&self, is_live: impl Fn(&InstanceId) -> bool) -> Vec<PublishSpec> {
        let all = self.given.iter().filter(|(instance, _)| is_live(instance));
        let spec = |instance: &InstanceId, (&port, &host_port): (&u16, &u16)| PublishSpec {
            instance: instance.clone(),
            bind: None,
            host_port,
            port,
            transport: Transport::Tcp,
        };
        all.flat_map(|(instance, given)| given.iter().map(move |pair| spec(instance, pair))).collect()
    }

    /// The tags that tell an instance's ports.
    pub(super) fn tags(&self, instance: &InstanceId) -> BTreeMap<String, String> {
        let given = self.given.get(instance).into_iter().flatten().take(MOST_TAGS);
        given.map(|(port, host_port)| (format!("{TAG}{port}"), host_port.to_string())).collect()
    }

    pub(super) fn warnings(&self) -> Vec<Warning> {
        let (first, last) = (self.range.start(), self.range.end());
        let short = self.short.iter().map(|(instance, port)| Warning {
            subject: instance.to_string(),
            problem: format!(
                "port {port} is not published: no port from {first} to {last} is free; widen --launch-ports"
            ),
        });
        let many = self.given.iter().filter(|(_, given)| given.len() > MOST_TAGS).map(|(instance, given)| Warning {
            subject: instance.to_string(),
            problem: format!("{MOST_TAGS} of its {} ports are in its tags; 'sg-agent ports' has all", given.len()),
        });
        let full = self.full.iter().map(|(instance, lacking)| Warning {
            subject: instance.to_string(),
            problem: format!("{lacking} ports are not published: an instance has at most {MOST_OF_AN_INSTANCE}"),
        });
        let unsaved = self.unsaved.iter().map(|error| Warning {
            subject: self.path.display().to_string(),
            problem: format!("cannot be written: {error}; after a restart instances may get other ports"),
        });
        short.chain(many).chain(full).chain(unsaved).collect()
    }

    fn save(&mut self, before: &BTreeMap<InstanceId, Given>) {
        if *before == self.given && self.unsaved.is_none() {
            return;
        }
        let fresh = self.path.with_extension("new");
        let written = serde_json::to_vec_pretty(&self.given)
            .map_err(io::Error::other)
            .and_then(|text| write(&fresh, &text))
            .and_then(|()| fs::rename(&fresh, &self.path));
        self.unsaved = written.err().map(|error| error.to_string());
    }
}

/// Writes a file that nobody else reads: the directory may be older than the agent, and open to others.
fn write(path: &Path, text: &[u8]) -> io::Result<()> {
    let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
    file.set_permissions(fs::Permissions::from_mode(0o600))?;
    file.write_all(text)
}

/// Whether anybody may listen there. Somebody may be faster: then the proxy says so.
fn is_free(port: u16) -> bool {
    TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok()
}

/// The ports that an instance's rules let somebody by an address into. Who is let in as a group's member is an
/// instance, and needs no port of the host.
pub(super) fn wanted(snapshot: &Snapshot, instance: &InstanceId, exposed: &BTreeSet<u16>) -> BTreeSet<u16> {
    let mut ports = BTreeSet::new();
    let interfaces = snapshot.interfaces.values().map(|enforced| &enforced.interface);
    for interface in interfaces.filter(|interface| interface.instance == *instance && interface.eni.is_some()) {
        let Some(Spec::Groups(groups)) = snapshot.policies.get(&interface.policy) else { continue };
        for rule in groups.ingress.iter().filter(|rule| matches!(rule.peers, Peers::Networks(_))) {
            ports.extend(of_rule(rule.traffic, exposed));
        }
    }
    ports
}

fn of_rule(traffic: Traffic, exposed: &BTreeSet<u16>) -> BTreeSet<u16> {
    let (from, to) = match traffic {
        Traffic::Tcp { from, to } => (from.max(1), to),
        Traffic::All => (1, u16::MAX),
        _ => return BTreeSet::new(),
    };
    if from > to {
        return BTreeSet::new();
    }
    if to - from < MOST_OF_A_RULE {
        return (from..=to).collect();
    }
    exposed.iter().copied().chain([SSH]).filter(|port| (from..=to).contains(port)).collect()
}

/// `FIRST-LAST`, as `--launch-ports` takes it.
///
/// # Errors
/// What is wrong with it.
pub fn parse_range(text: &str) -> Result<RangeInclusive<u16>, String> {
    let error = || format!("'{text}' is not FIRST-LAST, as 32000-32767");
    let (first, last) = text.split_once('-').ok_or_else(error)?;
    let (first, last): (u16, u16) = (first.parse().map_err(|_| error())?, last.parse().map_err(|_| error())?);
    if first == 0 || first > last { Err(error()) } else { Ok(first..=last) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn directory(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("sg-ports-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        path
    }

    /// Ports that nobody else on the machine is likely to have for the length of a test.
    fn range() -> RangeInclusive<u16> {
        DEFAULT_RANGE
    }

    fn one(instance: &str, ports: &[u16]) -> BTreeMap<InstanceId, BTreeSet<u16>> {
        BTreeMap::from([(instance.into(), ports.iter().copied().collect())])
    }

    #[test]
    fn numbers_are_kept_over_restarts_and_until_the_instance_is_gone() {
        let directory = directory("kept");
        let mut ports = Ports::load(&directory, range());
        ports.update(&one("i-1", &[22, 80]));
        ports.update(&one("i-2", &[22]));
        let given = ports.published(|_| true);
        let hosts: BTreeSet<u16> = given.iter().map(|spec| spec.host_port).collect();
        assert_eq!((given.len(), hosts.len()), (3, 3), "no port is given twice: {given:?}");
        // A rule that goes takes no port with it.
        ports.update(&one("i-1", &[]));
        assert_eq!(ports.published(|_| true), given);
        let mut again = Ports::load(&directory, range());
        again.update(&one("i-1", &[80]));
        assert_eq!(again.published(|_| true), given);
        let tags = again.tags(&"i-1".into());
        assert_eq!(tags["dev.sg-agent.port.22"], given[0].host_port.to_string());
        again.keep(|instance| *instance.0 == *"i-2");
        assert_eq!(again.published(|_| true).len(), 1);
        assert_eq!(Ports::load(&directory, range()).published(|_| true).len(), 1);
        let mode = fs::metadata(directory.join("ports.json")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        fs::remove_dir_all(&directory).unwrap();
    }

    #[test]
    fn a_port_that_somebody_has_is_passed_over_and_a_full_range_is_told() {
        let directory = directory("full");
        let other = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = other.local_addr().unwrap().port();
        let mut ports = Ports::load(&directory, port..=port);
        ports.update(&one("i-1", &[22]));
        assert!(ports.published(|_| true).is_empty());
        assert!(ports.warnings()[0].problem.contains("--launch-ports"), "{:?}", ports.warnings());
        drop(other);
        ports.update(&one("i-1", &[22]));
        assert_eq!(ports.published(|_| true)[0].host_port, port);
        assert!(ports.warnings().is_empty());
        fs::remove_dir_all(&directory).unwrap();
    }

    #[test]
    fn no_instance_takes_all_ports_of_the_host() {
        let directory = directory("bound");
        // Apart from the other tests' ports.
        let mut ports = Ports::load(&directory, 20_000..=20_999);
        let all: Vec<u16> = (1..=u16::MAX).collect();
        ports.update(&one("i-1", &all));
        assert_eq!(ports.published(|_| true).len(), MOST_OF_AN_INSTANCE);
        let told = |ports: &Ports, what: &str| ports.warnings().iter().any(|warning| warning.problem.contains(what));
        assert!(told(&ports, "65471 ports are not published"), "{:?}", ports.warnings());
        // What no rule wants makes room for what one does.
        ports.update(&one("i-1", &[5000, 5001]));
        let given = ports.published(|_| true);
        assert!([5000, 5001].iter().all(|port| given.iter().any(|spec| spec.port == *port)), "{given:?}");
        assert_eq!(given.len(), MOST_OF_AN_INSTANCE);
        assert!(!told(&ports, "not published"));
        fs::remove_dir_all(&directory).unwrap();
    }

    #[test]
    fn the_first_instances_ssh_is_at_32022() {
        let size = u32::from(*DEFAULT_RANGE.end()) - u32::from(*DEFAULT_RANGE.start()) + 1;
        assert_eq!(u32::from(*DEFAULT_RANGE.start()) + 22 % size, 32_022);
    }

    #[test]
    fn wide_rules_are_published_for_what_the_image_exposes() {
        let exposed = BTreeSet::from([80, 8080]);
        let of = |traffic| of_rule(traffic, &exposed).into_iter().collect::<Vec<_>>();
        assert_eq!(of(Traffic::Tcp { from: 22, to: 22 }), [22]);
        assert_eq!(of(Traffic::Tcp { from: 8000, to: 8002 }), [8000, 8001, 8002]);
        assert_eq!(of(Traffic::Tcp { from: 0, to: 65_535 }), [22, 80, 8080]);
        assert_eq!(of(Traffic::Tcp { from: 1024, to: 65_535 }), [8080]);
        assert_eq!(of(Traffic::All), [22, 80, 8080]);
        assert_eq!(of(Traffic::Udp { from: 53, to: 53 }), [0; 0]);
    }

    #[test]
    fn ranges_are_checked() {
        assert_eq!(parse_range("32000-32767"), Ok(DEFAULT_RANGE));
        for bad in ["", "1", "0-5", "9-8", "1-70000", "a-b"] {
            assert!(parse_range(bad).is_err(), "{bad}");
        }
    }
}
