package io.github.tokenbroker.client;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertFalse;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import io.grpc.Metadata;
import io.grpc.Status;
import java.io.IOException;
import java.io.PrintWriter;
import java.io.StringWriter;
import java.nio.charset.Charset;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.time.Duration;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import java.util.Optional;
import java.util.Set;
import java.util.concurrent.CountDownLatch;
import java.util.concurrent.ForkJoinPool;
import java.util.concurrent.TimeUnit;
import java.util.logging.Handler;
import java.util.logging.Level;
import java.util.logging.LogRecord;
import java.util.logging.Logger;
import org.junit.jupiter.api.AfterEach;
import org.junit.jupiter.api.BeforeEach;
import org.junit.jupiter.api.DisplayNameGeneration;
import org.junit.jupiter.api.DisplayNameGenerator.ReplaceUnderscores;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.io.TempDir;

@DisplayNameGeneration(ReplaceUnderscores.class)
class WireTest {
  /** Is long enough for a busy machine. */
  private static final Duration GENEROUS = Duration.ofSeconds(60);

  /** Of no key that anybody has. */
  private static final String CERTIFICATE =
      """
          -----BEGIN CERTIFICATE-----
          MIIBdTCCARugAwIBAgIUHQ0Cp+QbKrAjBAiRUktvLBr6fSUwCgYIKoZIzj0EAwIw
          DzENMAsGA1UEAwwEdGVzdDAgFw0yNjExMzAyMjEwNTdaGA8yMTI2MTEwNjIyMTA1
          N1owDzENMAsGA1UEAwwEdGVzdDBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABKQn
          GfBwrxpTpYKj2WbLAWGmyMsirUS+s2kcr4F3koJD+BkXlWzltzV35cwUcSdu9YPw
          oYTOSujEae8qxL+owuujUzBRMB0GA1UdDgQWBBSsGDH91n4WG1zSo92YJJqgTFqa
          ozAfBgNVHSMEGDAWgBSsGDH91n4WG1zSo92YJJqgTFqaozAPBgNVHRMBAf8EBTAD
          AQH/MAoGCCqGSM49BAMCA0gAMEUCICIuT1fV6LdammrUiNBRMtSrfL6a730S+uat
          x64JjanWAiEAxMztFxAcvkQ7+SODyAI+ZzS/8bye9kJTKXGifHR5ZHg=
          -----END CERTIFICATE-----
          """;

  @TempDir Path folder;

  private WireBroker broker;
  private Path bearer;

  @BeforeEach
  void start() throws IOException {
    broker = new WireBroker();
    bearer = Files.writeString(folder.resolve("bearer"), " tbk_first\n");
  }

  @AfterEach
  void stop() {
    broker.close();
  }

  private TokenClient client(String... endpoints) {
    return TokenClient.builder(endpoints).bearerFile(bearer).timeout(GENEROUS).build();
  }

  private static String endpointOfNobody() throws IOException {
    try (WireBroker away = new WireBroker()) {
      return away.endpoint();
    }
  }

  private static TokenBrokerException failure(TokenClient client, Duration timeout) {
    return failure(client, timeout, "acme");
  }

  private static TokenBrokerException failure(
      TokenClient client, Duration timeout, String account) {
    return assertThrows(TokenBrokerException.class, () -> client.token(account, timeout));
  }

  @Test
  void a_token_comes_from_the_broker() {
    try (TokenClient client = client(broker.endpoint())) {
      assertEquals("secret-1", client.token("acme").value());
    }
  }

  @Test
  void a_refusal_has_what_the_broker_says_about_it() {
    broker.failures.add(WireBroker.refusal(9, "CREDENTIAL_REJECTED"));
    try (TokenClient client = client(broker.endpoint())) {
      TokenBrokerException error = failure(client, GENEROUS);
      assertEquals(ErrorKind.CREDENTIAL_REJECTED, error.kind());
      assertEquals(Optional.of("acme"), error.account());
      assertEquals(Optional.of("FAILED_PRECONDITION"), error.code());
      assertEquals(Optional.of("CREDENTIAL_REJECTED"), error.reason());
      assertEquals(Optional.of("61006"), error.upstreamCode());
      assertEquals(Optional.of(Duration.ofSeconds(7)), error.retryAfter());
    }
  }

  @Test
  void a_refusal_whose_details_cannot_be_read_is_an_error_all_the_same() {
    Metadata trailers = new Metadata();
    trailers.put(
        Metadata.Key.of("grpc-status-details-bin", Metadata.BINARY_BYTE_MARSHALLER),
        new byte[] {(byte) 0xff});
    broker.failures.add(Status.PERMISSION_DENIED.asRuntimeException(trailers));
    try (TokenClient client = client(broker.endpoint())) {
      assertEquals(ErrorKind.NOT_GRANTED, failure(client, GENEROUS).kind());
    }
  }

  @Test
  void results_do_not_wait_for_the_common_pool() throws Exception {
    CountDownLatch end = new CountDownLatch(1);
    ForkJoinPool pool = ForkJoinPool.commonPool();
    for (int busy = 0; busy <= ForkJoinPool.getCommonPoolParallelism(); busy++) {
      pool.execute(
          () -> {
            try {
              end.await();
            } catch (InterruptedException interrupted) {
              Thread.currentThread().interrupt();
            }
          });
    }
    try (TokenClient client = client(broker.endpoint())) {
      client.token("acme");
      client.tokenAsync("other").get(60, TimeUnit.SECONDS);
    } finally {
      end.countDown();
    }
  }

  @Test
  void a_timeout_must_be_above_zero_and_can_be_very_long() {
    try (TokenClient client = client(broker.endpoint())) {
      assertEquals(ErrorKind.INVALID_ARGUMENT, failure(client, Duration.ZERO).kind());
      client.token("acme", Duration.ofSeconds(Long.MAX_VALUE));
    }
  }

  @Test
  void a_bearer_that_was_replaced_in_its_file_is_used_after_the_old_one_was_refused()
      throws IOException {
    try (TokenClient client = client(broker.endpoint())) {
      broker.bearer = "tbk_second";
      Files.writeString(bearer, "tbk_second");
      client.token("acme");
    }
  }

  @Test
  void a_bearer_that_is_still_the_old_one_is_refused() {
    broker.bearer = "tbk_second";
    try (TokenClient client = client(broker.endpoint())) {
      assertEquals(ErrorKind.UNAUTHENTICATED, failure(client, GENEROUS).kind());
    }
    assertEquals(1, broker.asks.get());
  }

  @Test
  void an_endpoint_that_is_away_costs_no_error_while_another_one_answers() throws Exception {
    try (TokenClient client = client(endpointOfNobody(), broker.endpoint())) {
      client.token("acme");
    }
  }

  @Test
  void a_client_of_a_broker_that_is_away_can_be_made_and_says_what_is_wrong() throws Exception {
    try (TokenClient client = client(endpointOfNobody())) {
      // The first attempt loads classes, which can take long.
      failure(client, Duration.ofSeconds(3));
      assertEquals(ErrorKind.UNAVAILABLE, failure(client, Duration.ofSeconds(3)).kind());
    }
  }

  @Test
  void a_client_without_a_usable_bearer_cannot_be_made_and_does_not_quote_the_file()
      throws IOException {
    Files.writeString(bearer, "two words");
    TokenBrokerException error =
        assertThrows(TokenBrokerException.class, () -> client(broker.endpoint()));
    assertEquals(ErrorKind.INVALID_ARGUMENT, error.kind());
    assertFalse(error.getMessage().contains("two words"));
  }

  @Test
  void files_for_tls_that_cannot_be_used_are_refused() {
    TokenBrokerException error =
        assertThrows(
            TokenBrokerException.class,
            () -> TokenClient.builder("https://127.0.0.1:1").caFile(bearer).build());
    assertEquals(ErrorKind.INVALID_ARGUMENT, error.kind());
    assertFalse(error.getMessage().contains("tbk_first"));
  }

  @Test
  void a_report_that_fails_is_not_sent_again() {
    try (TokenClient client = client(broker.endpoint())) {
      Token token = client.token("acme");
      broker.failures.add(Status.UNAVAILABLE.asRuntimeException());
      TokenBrokerException error =
          assertThrows(
              TokenBrokerException.class, () -> client.report("acme", token.generation(), "61003"));
      assertEquals(ErrorKind.UNAVAILABLE, error.kind());
    }
    assertEquals(1, broker.reports.get());
  }

  @Test
  void files_are_read_in_every_encoding_with_a_byte_order_mark() throws Exception {
    Path file = folder.resolve("file");
    for (Charset encoding :
        List.of(StandardCharsets.UTF_8, StandardCharsets.UTF_16LE, StandardCharsets.UTF_16BE)) {
      Files.writeString(file, "\ufefftbk_x\r\n", encoding);
      assertEquals("tbk_x", new BearerFile(file, new FakeLoop(), null).current());
      Files.writeString(file, "\ufeff" + CERTIFICATE, encoding);
      new TlsFiles(TextFiles.read(file), "", "").credentials();
    }
    for (String malformed : List.of("\u00ff\u00fet", "\u00ff\u00fe\0\u00d8", "t\0b\0")) {
      Files.writeString(file, malformed, StandardCharsets.ISO_8859_1);
      assertThrows(
          TokenBrokerException.class, () -> new BearerFile(file, new FakeLoop(), null), malformed);
    }
  }

  @Test
  void a_secret_that_is_given_instead_of_a_path_is_not_quoted() {
    String pem = "-----BEGIN PRIVATE KEY-----\ncanary\n-----END PRIVATE KEY-----\n";
    for (String secret :
        List.of(
            "tbk_canary",
            "can/ary",
            "can\\nary",
            "/canary",
            "//canary",
            "///canary",
            "/canary/canary",
            "canary\0",
            "/etc/canary\n",
            "https://canary",
            bearer + "/canary",
            "canary/" + "x".repeat(300) + "/y",
            pem)) {
      for (String name : List.of("BEARER_FILE", "CA_FILE", "CLIENT_CERT", "CLIENT_KEY")) {
        Map<String, String> environment = new HashMap<>();
        environment.put("TOKEN_BROKER_ENDPOINT", "https://localhost:1");
        if (name.startsWith("CLIENT")) {
          environment.put("TOKEN_BROKER_CLIENT_CERT", bearer.toString());
          environment.put("TOKEN_BROKER_CLIENT_KEY", bearer.toString());
        }
        environment.put("TOKEN_BROKER_" + name, secret);
        TokenBrokerException error =
            assertThrows(
                TokenBrokerException.class, () -> TokenClient.fromEnvironment(environment));
        assertEquals(ErrorKind.INVALID_ARGUMENT, error.kind());
        StringWriter text = new StringWriter();
        error.printStackTrace(new PrintWriter(text));
        assertFalse(
            text.toString().matches("(?s).*(canary|can/ary|can\\\\|BEGIN).*"), text::toString);
      }
    }
  }

  @Test
  void a_path_is_shown_if_it_or_its_directory_exists() {
    for (Path path : List.of(folder, bearer, folder.resolve("missing"))) {
      assertEquals(path.toString(), TextFiles.shown(path));
    }
  }

  @Test
  void files_for_tls_that_cannot_be_used_are_logged_each_time_when_they_break() throws IOException {
    Path ca = Files.writeString(folder.resolve("ca"), CERTIFICATE);
    TestLogger logger = new TestLogger();
    GrpcTransport transport =
        new GrpcTransport(
            Settings.from(TokenClient.builder("https://127.0.0.1:1").caFile(ca)),
            new FakeLoop(),
            new Log(logger, Runnable::run));
    try {
      for (int breaks = 1; breaks <= 2; breaks++) {
        Files.delete(ca);
        assertFalse(transport.refresh());
        assertFalse(transport.refresh());
        assertEquals(breaks, logger.warnings.size());
        Files.writeString(ca, CERTIFICATE);
        assertFalse(transport.refresh());
      }
      Files.writeString(ca, CERTIFICATE + "\n");
      assertTrue(transport.refresh(), "the files have changed");
    } finally {
      transport.close();
    }
  }

  @Test
  void a_handler_of_logs_may_fail_and_may_use_the_client() throws Exception {
    Logger logger = Logger.getLogger(TokenClient.class.getName());
    CountDownLatch used = new CountDownLatch(1);
    try (TokenClient client = client(broker.endpoint())) {
      Handler handler =
          new Handler() {
            @Override
            public void publish(LogRecord message) {
              client.token("of the handler");
              used.countDown();
              throw new IllegalStateException("as the test says");
            }

            @Override
            public void flush() {}

            @Override
            public void close() {}
          };
      logger.setLevel(Level.ALL);
      logger.addHandler(handler);
      try {
        client.token("acme");
        assertTrue(used.await(60, TimeUnit.SECONDS));
        broker.failures.add(WireBroker.refusal(7, "NOT_GRANTED"));
        assertEquals(ErrorKind.NOT_GRANTED, failure(client, GENEROUS, "refused").kind());
        // The watch goes on.
        int before = broker.streams.get();
        for (int tries = 0; broker.streams.get() < before + 2; tries++) {
          assertTrue(tries < 6000);
          Thread.sleep(10);
        }
      } finally {
        logger.removeHandler(handler);
        logger.setLevel(null);
      }
    }
  }

  @Test
  void an_interrupted_thread_gets_an_error_and_stays_interrupted() {
    try (TokenClient client = client(broker.endpoint())) {
      Thread.currentThread().interrupt();
      TokenBrokerException error = failure(client, GENEROUS);
      assertTrue(Thread.interrupted());
      assertEquals(ErrorKind.CANCELLED, error.kind());
    }
  }

  @Test
  void a_client_that_the_program_has_dropped_leaves_no_thread() throws InterruptedException {
    Thread thread = threadOfDroppedClient();
    for (int tries = 0; tries < 600 && thread.isAlive(); tries++) {
      System.gc();
      thread.join(100);
    }
    assertFalse(thread.isAlive());
  }

  /** Uses a client that is unreachable afterwards, and returns its thread. */
  @SuppressWarnings("resource")
  private Thread threadOfDroppedClient() {
    Set<Thread> before = Thread.getAllStackTraces().keySet();
    client(broker.endpoint()).token("acme");
    return Thread.getAllStackTraces().keySet().stream()
        .filter(thread -> thread.getName().equals("token-broker") && !before.contains(thread))
        .findFirst()
        .orElseThrow();
  }

  @Test
  void no_thread_is_left_that_keeps_a_program_alive() {
    try (TokenClient client = client(broker.endpoint())) {
      client.token("acme");
      assertTrue(
          Thread.getAllStackTraces().keySet().stream()
              .filter(thread -> thread.getName().startsWith("token-broker"))
              .allMatch(Thread::isDaemon));
    }
  }
}
