//! What one agent keeps on bpffs: the links of its programs, and the maps that packets wrote.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};

use aya::maps::{Array, Map, MapData, MapInfo};
use sg_common::abi::{self, Binding, Count, Direction, Flow, FlowKey, Fragment, FragmentSlot, Interface, ReasonKey};

use super::DatapathError;
use super::attach::Point;
use super::filter::{self, has_tcx};

/// The maps that packets write: a new set of programs goes on with them.
const SHARED: [(&str, &str, Size); 5] = [
    ("FLOWS", "flows", size::<FlowKey, Flow>(abi::MAX_FLOWS)),
    ("TRACKED", "tracked", size::<u32, i64>(abi::MAX_INTERFACES)),
    ("FRAGMENTS", "fragments", size::<FragmentSlot, Fragment>(abi::MAX_FRAGMENTS)),
    ("USUAL", "usual", size::<u32, [Count; abi::USUAL_KINDS]>(2 * abi::MAX_INTERFACES)),
    ("REASONS", "reasons", size::<ReasonKey, Count>(abi::MAX_COUNTERS)),
];
/// The maps from which the next agent learns the numbers that flows know interfaces and policies by.
const NUMBERS: [(&str, Size); 2] = [
    ("interfaces", size::<u32, Interface>(abi::MAX_INTERFACES)),
    ("bindings", size::<u32, Binding>(abi::MAX_BINDINGS)),
];

/// Sizes of a map's keys and values, and how many entries it has at most.
type Size = (u32, u32, u32);

const fn size<K, V>(entries: u32) -> Size {
    (size_of::<K>() as u32, size_of::<V>() as u32, entries)
}

/// An agent's directory on bpffs.
#[derive(Clone, Debug)]
pub struct Pins {
    directory: PathBuf,
}

/// What `sg-agent detach` took away.
#[derive(Debug, Default, serde::Serialize)]
pub struct DetachReport {
    /// Programs taken off links.
    pub links: usize,
    /// Maps unpinned.
    pub maps: usize,
    /// Whether the gate at bridges was opened.
    pub gate: bool,
    /// What could not be removed, and why.
    pub errors: Vec<String>,
}

impl Pins {
    /// The directory, which need not exist yet. Its parent must be on bpffs.
    pub fn new(directory: impl Into<PathBuf>) -> Self {
        Self { directory: directory.into() }
    }

    pub(super) fn directory(&self) -> &Path {
        &self.directory
    }

    /// Makes the directory, takes it, and drops the maps of other layouts. Whether there are flows to carry over.
    pub(super) fn prepare(&self) -> Result<(Option<Flock<fs::File>>, bool), DatapathError> {
        let fail = |path: &Path| {
            let path = path.to_owned();
            move |error| DatapathError::Pins { path, error }
        };
        self.check_file_system()?;
        let links = self.directory.join("links");
        fs::create_dir_all(&links).map_err(fail(&links))?;
        let lock = self.lock()?;
        let current = format!("-v{}", abi::LAYOUT);
        for path in list(&self.directory).map_err(fail(&self.directory))? {
            let is_current = path.file_name().is_some_and(|name| name.to_string_lossy().ends_with(&current));
            if path.is_file() && !is_current {
                remove(&path).map_err(fail(&path))?;
            }
        }
        if let Some(path) = self.misfit() {
            let path = path.display();
            tracing::warn!(
                "{path} is no map of this layout: flows and counters of an earlier agent are not gone on with"
            );
            for path in self.maps().map(|(path, _)| path) {
                remove(&path).map_err(fail(&path))?;
            }
        }
        Ok((lock, self.map("flows").exists()))
    }

    /// A file that has the name of a map of this layout, and not its size.
    fn misfit(&self) -> Option<PathBuf> {
        let is_misfit = |path: &Path, size| {
            let info = MapInfo::from_pin(path).map(|map| (map.key_size(), map.value_size(), map.max_entries()));
            path.exists() && !info.is_ok_and(|found| found == size)
        };
        self.maps().find(|(path, size)| is_misfit(path, *size)).map(|(path, _)| path)
    }

    /// Every map that is kept, whether or not it is there.
    fn maps(&self) -> impl Iterator<Item = (PathBuf, Size)> + '_ {
        let shared = SHARED.iter().map(|&(_, file, size)| (file, size));
        shared.chain(NUMBERS).map(|(file, size)| (self.map(file), size))
    }

    /// Pins live on bpffs only; on any other file system the directory isn't even made.
    fn check_file_system(&self) -> Result<(), DatapathError> {
        let fail = |error| DatapathError::Pins { path: self.directory.clone(), error };
        let existing = self.directory.ancestors().find(|path| path.exists());
        let existing = existing.ok_or_else(|| fail(io::ErrorKind::NotFound.into()))?;
        let statistics = statfs(existing).map_err(|error| fail(error.into()))?;
        if statistics.filesystem_type() == BPF_FS_MAGIC {
            return Ok(());
        }
        Err(fail(io::Error::other(format!("{} is not on a bpf file system", existing.display()))))
    }

    /// Takes the directory for this process: two agents with one directory would take each other's programs off.
    /// `None` where there is no directory.
    ///
    /// # Errors
    /// [`DatapathError::PinsHeld`]
    pub fn lock(&self) -> Result<Option<Flock<fs::File>>, DatapathError> {
        let fail = |error| DatapathError::Pins { path: self.directory.clone(), error };
        let directory = match fs::File::open(&self.directory) {
            Ok(directory) => directory,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(fail(error)),
        };
        match Flock::lock(directory, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => Ok(Some(lock)),
            Err((_, Errno::EWOULDBLOCK)) => Err(DatapathError::PinsHeld { path: self.directory.clone() }),
            Err((_, error)) => Err(fail(error.into())),
        }
    }

    /// The file of a map; its name has the layout, so that another one's is never taken for it. (No dot: bpffs refuses it.)
    fn map(&self, name: &str) -> PathBuf {
        self.directory.join(format!("{name}-v{}", abi::LAYOUT))
    }

    pub(super) fn shared_maps(&self) -> impl Iterator<Item = (&'static str, PathBuf)> + '_ {
        SHARED.iter().map(|(map, file, _)| (*map, self.map(file)))
    }

    /// The interfaces of an earlier agent, by link index, and the last epoch that it gave.
    pub(super) fn earlier(&self) -> Option<(HashMap<u32, Interface>, u32)> {
        let interfaces = Map::HashMap(MapData::from_pin(self.map("interfaces")).ok()?);
        let interfaces: aya::maps::HashMap<MapData, u32, Interface> = interfaces.try_into().ok()?;
        let bindings = Map::Array(MapData::from_pin(self.map("bindings")).ok()?);
        let bindings: Array<MapData, Binding> = bindings.try_into().ok()?;
        let last = bindings.iter().filter_map(Result::ok).map(|binding| binding.epoch).max().unwrap_or(0);
        Some((interfaces.iter().filter_map(Result::ok).collect(), last))
    }

    /// Pins the maps of [`NUMBERS`] in the place of an earlier agent's.
    pub(super) fn keep_numbers(&self, interfaces: &MapData, bindings: &MapData) -> Result<(), DatapathError> {
        for ((name, _), map) in NUMBERS.into_iter().zip([interfaces, bindings]) {
            let path = self.map(name);
            remove(&path).map_err(|error| DatapathError::Pins { path: path.clone(), error })?;
            map.pin(&path).map_err(|error| DatapathError::Pins { path, error: io::Error::other(error) })?;
        }
        Ok(())
    }

    /// Whether a program is pinned for this direction of a link.
    pub fn has_link(&self, ifindex: u32) -> bool {
        let both = [Direction::Ingress, Direction::Egress].map(Point::Instance);
        both.iter().all(|&point| self.link(ifindex, point).exists())
    }

    /// Takes the programs off a link that nobody holds any more. Whether there were any.
    ///
    /// # Errors
    /// The first that was met.
    pub fn remove_link(&self, ifindex: u32) -> io::Result<bool> {
        let one = remove_attachment(&self.link(ifindex, Point::Instance(Direction::Ingress)));
        let other = remove_attachment(&self.link(ifindex, Point::Instance(Direction::Egress)));
        Ok(one? | other?)
    }

    /// Where what sits on a link is pinned.
    pub(super) fn link(&self, ifindex: u32, point: Point) -> PathBuf {
        self.directory.join("links").join(format!("{ifindex}-{}", point_name(point)))
    }

    /// Takes off what a killed agent left at the links of published ports: filters, which outlive who made them.
    ///
    /// # Errors
    /// The first that was met.
    pub(super) fn remove_published(&self) -> io::Result<()> {
        for path in list(&self.directory.join("links"))? {
            if let Some((_, Point::Published)) = attachment(&path) {
                remove_attachment(&path)?;
            }
        }
        Ok(())
    }

    /// The indices of the instances' links that have something pinned.
    ///
    /// # Errors
    /// Those of reading the directory; one that isn't there has none.
    pub fn attached(&self) -> io::Result<Vec<u32>> {
        let mut indices = Vec::new();
        for name in list(&self.directory.join("links"))? {
            let found = attachment(&name).filter(|(_, point)| matches!(point, Point::Instance(_)));
            indices.extend(found.map(|(ifindex, _)| ifindex));
        }
        indices.sort_unstable();
        indices.dedup();
        Ok(indices)
    }

    /// Takes everything of this agent away: programs off links, maps, the directory. Goes on past errors.
    pub fn remove_all(&self) -> DetachReport {
        let mut report = DetachReport::default();
        let links = self.directory.join("links");
        report.links = report.remove_files(&links, remove_attachment);
        report.maps = report.remove_files(&self.directory, remove);
        report.gate = self.open_bridges().unwrap_or_else(|error| {
            report.fail("open the bridges of", &self.directory, &error);
            false
        });
        for directory in [&links, &self.directory] {
            match fs::remove_dir(directory) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => report.fail("remove", directory, &error),
                _ => {}
            }
        }
        report
    }
}

impl DetachReport {
    /// Removes a directory's files; how many there were.
    fn remove_files(&mut self, directory: &Path, remove: fn(&Path) -> io::Result<bool>) -> usize {
        let paths = list(directory).unwrap_or_else(|error| {
            self.fail("list", directory, &error);
            Vec::new()
        });
        let mut removed = 0;
        for path in paths.iter().filter(|path| !path.is_dir()) {
            match remove(path) {
                Ok(was_there) => removed += usize::from(was_there),
                Err(error) => self.fail("remove", path, &error),
            }
        }
        removed
    }

    fn fail(&mut self, verb: &str, path: &Path, error: &io::Error) {
        self.errors.push(format!("cannot {verb} {}: {error}", path.display()));
    }
}

fn point_name(point: Point) -> &'static str {
    match point {
        Point::Instance(Direction::Ingress) => "ingress",
        Point::Instance(Direction::Egress) => "egress",
        Point::Published => "published",
    }
}

/// The link and place that a file in `links` stands for.
fn attachment(path: &Path) -> Option<(u32, Point)> {
    let (ifindex, name) = path.file_name()?.to_str()?.split_once('-')?;
    let point = Point::ALL.into_iter().find(|&point| point_name(point) == name)?;
    Some((ifindex.parse().ok()?, point))
}

/// Removes a file of `links`, and the program from the link with it; whether there was one. A TCX link ends with its
/// last reference, a filter doesn't.
fn remove_attachment(path: &Path) -> io::Result<bool> {
    if let Some((ifindex, point)) = attachment(path)
        && !has_tcx()
        && path.exists()
    {
        filter::remove(ifindex, point)?;
    }
    remove(path)
}

/// Removes a file; whether there was one.
pub(super) fn remove(path: &Path) -> io::Result<bool> {
    match fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

fn list(directory: &Path) -> io::Result<Vec<PathBuf>> {
    match fs::read_dir(directory) {
        Ok(entries) => entries.map(|entry| entry.map(|entry| entry.path())).collect(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}
