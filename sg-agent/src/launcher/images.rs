//! Which image stands for which machine image: flags, a TOML file, a default. Owns the choice; pulls nothing.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::Deserialize;

/// The image where nothing else is said: BusyBox and an SSH server, which `cargo xtask run` makes of the machine's own
/// files.
pub const DEFAULT_IMAGE: &str = "sg-agent/instance:latest";

/// `AMI=IMAGE`, as `--launch-image` takes it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ImageSpec {
    /// A machine image's id or name; `*` stands for any text.
    pub ami: String,
    /// The Docker image.
    pub image: String,
}

/// An `AMI=IMAGE` that can't be read.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("'{0}' is not AMI=IMAGE; write it as ami-12c6146b=debian:12 or 'ubuntu-*=ubuntu:24.04'")]
pub struct InvalidImage(String);

/// An image's name, as `--launch-default-image` takes it.
///
/// # Errors
/// What is wrong with it.
pub fn parse_image(text: &str) -> Result<String, String> {
    if is_image(text) { Ok(text.to_owned()) } else { Err(format!("{text:?} is no image's name, as debian:12")) }
}

impl FromStr for ImageSpec {
    type Err = InvalidImage;

    fn from_str(text: &str) -> Result<Self, InvalidImage> {
        match text.split_once('=') {
            Some((ami, image)) if !ami.is_empty() && is_image(image) => {
                Ok(Self { ami: ami.to_owned(), image: image.to_owned() })
            }
            _ => Err(InvalidImage(text.to_owned())),
        }
    }
}

/// Whether a text can be an image's name; Docker knows whether it is one.
fn is_image(text: &str) -> bool {
    text.starts_with(|first: char| first.is_ascii_alphanumeric())
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-/:@".contains(&byte))
        && !text.contains("..")
}

/// What `--launch-config` holds.
#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
struct File {
    default: Option<String>,
    #[serde(default)]
    images: BTreeMap<String, String>,
}

/// Why a configuration file isn't one.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// It can't be read.
    #[error("{path}: {error}; is the path of --launch-config right?", path = path.display())]
    Io {
        /// Its path.
        path: PathBuf,
        /// Why.
        error: std::io::Error,
    },
    /// It isn't what it should be.
    #[error("{path}: {problem}; expected are default = \"IMAGE\" and a table [images] of \"AMI\" = \"IMAGE\"", path = path.display())]
    Content {
        /// Its path.
        path: PathBuf,
        /// What is wrong, and where.
        problem: String,
    },
}

/// Which image stands for which machine image.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Images {
    /// In this order; the first that fits is taken.
    specs: Vec<ImageSpec>,
    default: String,
}

impl Images {
    /// Flags go before the file.
    ///
    /// # Errors
    /// The file isn't one.
    pub fn new(flags: Vec<ImageSpec>, default: Option<String>, file: Option<&Path>) -> Result<Self, ConfigError> {
        let config = file.map(read).transpose()?.unwrap_or_default();
        let mut of_file: Vec<ImageSpec> =
            config.images.into_iter().map(|(ami, image)| ImageSpec { ami, image }).collect();
        // What names one image goes before what names many, and the longer pattern before the shorter.
        of_file.sort_by_key(|spec| (spec.ami.contains('*'), std::cmp::Reverse(spec.ami.len())));
        let default = default.or(config.default).unwrap_or_else(|| DEFAULT_IMAGE.to_owned());
        Ok(Self { specs: flags.into_iter().chain(of_file).collect(), default })
    }

    /// The image by a machine image's id alone, if that settles it: names cost a question.
    pub fn by_id(&self, ami: &str) -> Option<&str> {
        let first = self.specs.iter().find(|spec| !spec.ami.starts_with("ami-") || fits(&spec.ami, ami));
        match first {
            None => Some(&self.default),
            Some(spec) if fits(&spec.ami, ami) => Some(&spec.image),
            Some(_) => None,
        }
    }

    /// The image by id and name.
    pub fn by_name(&self, ami: &str, name: Option<&str>) -> &str {
        let fitting = |spec: &&ImageSpec| fits(&spec.ami, ami) || name.is_some_and(|name| fits(&spec.ami, name));
        self.specs.iter().find(fitting).map_or(&self.default, |spec| &spec.image)
    }
}

fn read(path: &Path) -> Result<File, ConfigError> {
    let text = std::fs::read_to_string(path).map_err(|error| ConfigError::Io { path: path.to_owned(), error })?;
    let wrong = |problem: String| ConfigError::Content { path: path.to_owned(), problem };
    let file: File = toml::from_str(&text).map_err(|error| wrong(error.to_string().trim_end().replace('\n', " ")))?;
    match file.images.values().chain(&file.default).find(|image| !is_image(image)) {
        Some(image) => Err(wrong(format!("{image:?} is no image's name"))),
        None => Ok(file),
    }
}

/// Whether a text is as the pattern says, in which `*` stands for any text.
fn fits(pattern: &str, text: &str) -> bool {
    let Some((start, rest)) = pattern.split_once('*') else { return pattern == text };
    let Some(mut left) = text.strip_prefix(start) else { return false };
    let mut parts: Vec<&str> = rest.split('*').collect();
    let end = parts.pop().unwrap_or_default();
    for part in parts {
        let Some(at) = left.find(part) else { return false };
        left = &left[at + part.len()..];
    }
    left.ends_with(end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_star_stands_for_any_text() {
        for (pattern, text, fit) in [
            ("ami-1", "ami-1", true),
            ("ami-1", "ami-12", false),
            ("ubuntu*", "ubuntu-24.04", true),
            ("*", "", true),
            ("a*b*c", "a-b-b-c", true),
            ("a*b*c", "a-c", false),
            ("a*a", "a", false),
            ("*server*", "ubuntu-server-24", true),
            ("*2017*x86", "amzn-2017-arm", false),
        ] {
            assert_eq!(fits(pattern, text), fit, "{pattern} {text}");
        }
    }

    #[test]
    fn flags_go_before_the_file_and_exact_before_patterns() {
        let path = std::env::temp_dir().join(format!("sg-images-{}.toml", std::process::id()));
        let text =
            "default = \"base:1\"\n[images]\n\"ubuntu*\" = \"u:1\"\n\"ubuntu-24\" = \"u:24\"\n\"ami-1\" = \"one:1\"\n";
        std::fs::write(&path, text).unwrap();
        let flags = vec!["ami-2=two:1".parse().unwrap()];
        let images = Images::new(flags, None, Some(&path)).unwrap();
        assert_eq!(images.by_id("ami-2"), Some("two:1"));
        assert_eq!(images.by_id("ami-3"), None, "its name may be in the file");
        assert_eq!(images.by_name("ami-3", Some("ubuntu-24")), "u:24");
        assert_eq!(images.by_name("ami-3", Some("ubuntu-22")), "u:1");
        assert_eq!(images.by_name("ami-1", None), "one:1");
        assert_eq!(images.by_name("ami-3", None), "base:1");
        for bad in ["images = 1", "defualt = \"x\"", "default = \"a b\"", "[images]\n\"ami-1\" = \"\""] {
            std::fs::write(&path, bad).unwrap();
            let error = Images::new(Vec::new(), None, Some(&path)).unwrap_err().to_string();
            assert!(error.starts_with(&path.display().to_string()) && !error.contains('\n'), "{error}");
        }
        std::fs::remove_file(&path).unwrap();
        assert_eq!(Images::new(Vec::new(), None, None).unwrap().by_id("ami-1"), Some(DEFAULT_IMAGE));
    }

    #[test]
    fn what_is_no_pair_is_named() {
        for bad in ["", "ami-1", "=x", "ami-1=", "ami-1=a b", "ami-1=$(id)", "ami-1=../x", "ami-1=-x"] {
            let error = bad.parse::<ImageSpec>().unwrap_err().to_string();
            assert!(error.starts_with(&format!("'{bad}' is not")), "{error}");
        }
        assert_eq!(parse_image("registry.example:5000/a/b@sha256:0"), Ok("registry.example:5000/a/b@sha256:0".into()));
        assert!(["", "/containers", "a?b", "a b"].iter().all(|bad| parse_image(bad).is_err()));
    }
}
