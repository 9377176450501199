//! The fields of a message that are between two neighbours only (RFC 9110, 7.6.1). All others pass as they are.

use http::{HeaderMap, HeaderName, header};

/// Fields about the connection, whether or not `Connection` names them. `Trailer` isn't one; `Expect` is passed on.
const HOP_BY_HOP: [HeaderName; 5] = [
    header::CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    header::TRANSFER_ENCODING,
    header::UPGRADE,
];

/// Takes out what the other neighbour mustn't see. Without `Upgrade` a request is one for the protocol that it is in,
/// which is how a server answers that can't switch.
pub fn strip(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        // A message's own framing and address aren't options of a connection, whatever it says.
        .filter(|name| *name != header::HOST && *name != header::CONTENT_LENGTH)
        .collect();
    for name in named.iter().chain(&HOP_BY_HOP).chain([&header::TE]) {
        headers.remove(name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_about_the_connection_goes() {
        let mut headers = HeaderMap::new();
        for (name, value) in [
            ("host", "127.0.0.1:4566"),
            ("connection", "keep-alive, X-Private"),
            ("connection", "Upgrade, content-length"),
            ("keep-alive", "timeout=5"),
            ("x-private", "1"),
            ("upgrade", "websocket"),
            ("te", "trailers"),
            ("transfer-encoding", "chunked"),
            ("content-length", "3"),
            ("trailer", "x-amz-checksum-crc32"),
            ("expect", "100-continue"),
            ("x-amz-date", "20260101T000000Z"),
        ] {
            headers.append(HeaderName::from_static(name), value.parse().unwrap());
        }
        strip(&mut headers);
        let mut left: Vec<&str> = headers.keys().map(HeaderName::as_str).collect();
        left.sort_unstable();
        assert_eq!(left, ["content-length", "expect", "host", "trailer", "x-amz-date"]);
    }
}
