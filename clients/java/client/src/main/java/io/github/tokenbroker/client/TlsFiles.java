package io.github.tokenbroker.client;

import io.grpc.ChannelCredentials;
import io.grpc.TlsChannelCredentials;
import java.io.ByteArrayInputStream;
import java.io.IOException;
import java.io.InputStream;
import java.nio.charset.StandardCharsets;
import java.nio.file.Path;
import java.security.GeneralSecurityException;
import java.security.KeyFactory;
import java.security.PrivateKey;
import java.security.PublicKey;
import java.security.Signature;
import java.security.cert.Certificate;
import java.security.cert.CertificateFactory;
import java.security.spec.PKCS8EncodedKeySpec;
import java.util.Base64;

/**
 * The contents of the files for TLS at one moment. They are empty if a file is not set.
 *
 * @param ca the certificates to trust
 * @param cert the client's certificate
 * @param key its key
 */
record TlsFiles(String ca, String cert, String key) {
  static TlsFiles read(Settings settings) throws IOException {
    return new TlsFiles(
        read(settings.caFile()), read(settings.clientCertFile()), read(settings.clientKeyFile()));
  }

  /** Does not print the key. */
  @Override
  public String toString() {
    return "TlsFiles";
  }

  /**
   * Returns credentials with these contents.
   *
   * @throws GeneralSecurityException if a file is no PEM, or if the key is not that of the
   *     certificate
   */
  ChannelCredentials credentials() throws IOException, GeneralSecurityException {
    TlsChannelCredentials.Builder builder = TlsChannelCredentials.newBuilder();
    if (!ca.isEmpty()) {
      certificate(ca);
      builder.trustManager(stream(ca));
    }
    if (!cert.isEmpty()) {
      checkPair(certificate(cert).getPublicKey(), privateKey(key));
      builder.keyManager(stream(cert), stream(key));
    }
    return builder.build();
  }

  private static String read(Path file) throws IOException {
    return file == null ? "" : TextFiles.read(file);
  }

  private static InputStream stream(String text) {
    return new ByteArrayInputStream(text.getBytes(StandardCharsets.UTF_8));
  }

  private static Certificate certificate(String pem) throws GeneralSecurityException {
    return CertificateFactory.getInstance("X.509").generateCertificate(stream(pem));
  }

  private static PrivateKey privateKey(String pem) throws GeneralSecurityException {
    String body =
        pem.replaceFirst("(?s).*-----BEGIN PRIVATE KEY-----", "")
            .replaceFirst("(?s)-----END PRIVATE KEY-----.*", "");
    byte[] der;
    try {
      der = Base64.getMimeDecoder().decode(body);
    } catch (IllegalArgumentException malformed) {
      throw new GeneralSecurityException("the key is no PKCS #8 in PEM");
    }
    for (String algorithm : new String[] {"EC", "RSA", "Ed25519"}) {
      try {
        return KeyFactory.getInstance(algorithm).generatePrivate(new PKCS8EncodedKeySpec(der));
      } catch (GeneralSecurityException other) {
        // It may be a key for another algorithm.
      }
    }
    throw new GeneralSecurityException("the key is no PKCS #8 in PEM");
  }

  /** Fails unless what one key signs can be verified with the other. */
  private static void checkPair(PublicKey publicKey, PrivateKey privateKey)
      throws GeneralSecurityException {
    if (!publicKey.getAlgorithm().equals(privateKey.getAlgorithm())) {
      throw new GeneralSecurityException("the key is not that of the certificate");
    }
    String algorithm =
        switch (privateKey.getAlgorithm()) {
          case "RSA" -> "SHA256withRSA";
          case "EC" -> "SHA256withECDSA";
          default -> privateKey.getAlgorithm();
        };
    byte[] message = "a message".getBytes(StandardCharsets.ISO_8859_1);
    Signature signature = Signature.getInstance(algorithm);
    signature.initSign(privateKey);
    signature.update(message);
    byte[] signed = signature.sign();
    signature.initVerify(publicKey);
    signature.update(message);
    if (!signature.verify(signed)) {
      throw new GeneralSecurityException("the key is not that of the certificate");
    }
  }
}
