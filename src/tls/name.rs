//! Comparison of the names of CAs.

use x509_parser::{
    asn1_rs::Tag,
    x509::{AttributeTypeAndValue, RelativeDistinguishedName, X509Name},
};

/// A name in a form in which two encodings of one name are equal: they may differ in the type of string, in case and
/// in white space (RFC 5280, section 7.1).
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct ComparableName(Vec<(String, String)>);

impl ComparableName {
    pub(super) fn of(name: &X509Name<'_>) -> Self {
        let attributes = name.iter_rdn().flat_map(RelativeDistinguishedName::iter);
        Self(attributes.map(|it| (it.attr_type().to_id_string(), comparable(it))).collect())
    }
}

fn comparable(attribute: &AttributeTypeAndValue<'_>) -> String {
    let bytes = attribute.as_slice();
    let text = if attribute.attr_value().tag() == Tag::BmpString {
        let units: Vec<_> = bytes
            .chunks(2)
            .map(|pair| pair.iter().fold(0, |unit, byte| unit << 8 | u16::from(*byte)))
            .collect();
        String::from_utf16_lossy(&units)
    } else {
        String::from_utf8_lossy(bytes).into_owned()
    };
    text.split_whitespace().collect::<Vec<_>>().join(" ").to_lowercase()
}
