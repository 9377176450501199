//! What an identifier from outside (a label, a name, a flag) may look like. Owns the checks, and no meaning.
//!
//! Everything that passes is plain ASCII without separators, so it is safe in a log line, a map key and a path.

/// The longest name that the kernel gives a link (IFNAMSIZ less the final zero).
const LONGEST_LINK: usize = 15;

/// The longest identifier that is taken.
const LONGEST: usize = 64;

/// An instance's or interface's id; emulators' ids need not be hexadecimal.
pub(crate) fn id(text: &str) -> Result<&str, String> {
    let plain = text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
    if text.is_empty() || text.len() > LONGEST || !plain {
        return Err(format!("{} is no id: 1 to {LONGEST} letters, digits and hyphens", quoted(text)));
    }
    Ok(text)
}

/// A twelve-digit account.
pub(super) fn account(text: &str) -> Result<&str, String> {
    if text.len() != 12 || !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(format!("{} is no account: twelve digits", quoted(text)));
    }
    Ok(text)
}

/// A region, as `us-east-1`.
pub(super) fn region(text: &str) -> Result<&str, String> {
    let plain = text.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-');
    if text.is_empty() || text.len() > LONGEST || !plain {
        return Err(format!("{} is no region: like us-east-1", quoted(text)));
    }
    Ok(text)
}

/// A unicast MAC address.
pub(crate) fn mac(text: &str) -> Result<[u8; 6], String> {
    let problem = || format!("{} is no unicast MAC address, as 02:42:ac:11:00:02", quoted(text));
    let mut mac = [0; 6];
    let mut parts = text.split([':', '-']);
    for byte in &mut mac {
        let part = parts.next().filter(|part| part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit()));
        *byte = u8::from_str_radix(part.ok_or_else(problem)?, 16).map_err(|_| problem())?;
    }
    if parts.next().is_some() || mac == [0; 6] || mac[0] & 1 != 0 {
        return Err(problem());
    }
    Ok(mac)
}

/// Text of unknown origin for a message: escaped, and cut if it is long.
pub(crate) fn quoted(text: &str) -> String {
    match text.char_indices().nth(LONGEST + 1) {
        Some((end, _)) => format!("{:?}…", &text[..end]),
        None => format!("{text:?}"),
    }
}

/// A link's name.
pub(crate) fn link(text: &str) -> Result<&str, String> {
    let plain = text.chars().all(|c| c.is_ascii_graphic() && c != '/' && c != ':');
    if text.is_empty() || text.len() > LONGEST_LINK || !plain || text == "." || text == ".." {
        return Err(format!("{} is no link's name: 1 to {LONGEST_LINK} characters, as in `ip link`", quoted(text)));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_need_not_be_hexadecimal_but_plain() {
        for good in ["i-0abc", "i-web-1", "I9", &"a".repeat(64)] {
            assert_eq!(id(good), Ok(good));
        }
        for bad in ["", "i 1", "i-1\n", "i/../1", "i_1", "í-1", "$(id)", &"a".repeat(65)] {
            assert!(id(bad).is_err(), "{bad:?} was taken");
        }
    }

    #[test]
    fn accounts_and_regions_are_checked() {
        assert_eq!(account("000000000000"), Ok("000000000000"));
        assert!(["", "1234", "12345678901a", "1234567890123"].iter().all(|bad| account(bad).is_err()));
        assert_eq!(region("us-gov-west-1"), Ok("us-gov-west-1"));
        assert!(["", "US-EAST-1", "us east", "../x"].iter().all(|bad| region(bad).is_err()));
    }

    #[test]
    fn what_is_quoted_is_escaped_and_cut() {
        assert_eq!(quoted("a\n\u{1b}[31m"), r#""a\n\u{1b}[31m""#);
        assert!(quoted(&"é".repeat(1000)).len() < 200);
    }
}
