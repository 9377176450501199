//! What a kernel can do that only some tests need. They are ignored by default, each with the name of what it needs, so
//! that libtest counts those that can't run as skipped; where the kernel can, they aren't ignored.

use std::ffi::OsString;
use std::fs;

/// The first Linux with TCX.
const TCX: (u32, u32) = (6, 6);

/// What the test programs are told on this machine.
pub fn options_here() -> Vec<OsString> {
    options(&fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default())
}

/// What the test programs are told in a virtual machine with a kernel of this version: it has no systemd.
pub fn options_of_machine(version: &str) -> Vec<OsString> {
    let mut options = options(version);
    options.extend(["--skip".into(), "unit::".into()]);
    options
}

fn options(version: &str) -> Vec<OsString> {
    if has_tcx(version) { vec!["--include-ignored".into()] } else { Vec::new() }
}

fn has_tcx(version: &str) -> bool {
    let mut numbers = version.split(|char: char| !char.is_ascii_digit()).map(str::parse);
    matches!((numbers.next(), numbers.next()), (Some(Ok(major)), Some(Ok(minor))) if (major, minor) >= TCX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_has_tcx_by_its_version() {
        for (version, has) in
            [("6.18.5-1-amd64\n", true), ("6.6", true), ("7.0.0", true), ("6.1.0-40", false), ("", false)]
        {
            assert_eq!(has_tcx(version), has, "{version:?}");
        }
    }
}
