package io.github.tokenbroker.client;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertFalse;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import io.grpc.Metadata;
import io.grpc.Status;
import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.time.Duration;
import java.util.Optional;
import java.util.Set;
import java.util.concurrent.CountDownLatch;
import java.util.concurrent.ForkJoinPool;
import java.util.concurrent.TimeUnit;
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
    return assertThrows(TokenBrokerException.class, () -> client.token("acme", timeout));
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
