package io.github.tokenbroker.client;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import com.sun.net.httpserver.HttpExchange;
import com.sun.net.httpserver.HttpServer;
import io.github.tokenbroker.client.okhttp.TokenInterceptor;
import io.github.tokenbroker.client.spring.TokenExchangeFilter;
import io.github.tokenbroker.client.spring.TokenRequestInterceptor;
import java.io.IOException;
import java.net.InetSocketAddress;
import java.net.URI;
import java.net.http.HttpClient;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.time.Duration;
import java.util.List;
import java.util.concurrent.CopyOnWriteArrayList;
import java.util.concurrent.atomic.AtomicInteger;
import okhttp3.OkHttpClient;
import okhttp3.Request;
import okhttp3.RequestBody;
import okhttp3.Response;
import org.junit.jupiter.api.AfterEach;
import org.junit.jupiter.api.BeforeEach;
import org.junit.jupiter.api.DisplayNameGeneration;
import org.junit.jupiter.api.DisplayNameGenerator.ReplaceUnderscores;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.io.TempDir;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.EnumSource;
import org.springframework.core.io.buffer.DataBuffer;
import org.springframework.core.io.buffer.DefaultDataBufferFactory;
import org.springframework.http.HttpMethod;
import org.springframework.http.HttpStatusCode;
import org.springframework.http.client.JdkClientHttpRequestFactory;
import org.springframework.http.client.reactive.JdkClientHttpConnector;
import org.springframework.web.client.RestClient;
import org.springframework.web.reactive.function.client.ClientRequest;
import org.springframework.web.reactive.function.client.ClientResponse;
import org.springframework.web.reactive.function.client.WebClient;
import reactor.core.publisher.Flux;
import reactor.core.publisher.Mono;

@DisplayNameGeneration(ReplaceUnderscores.class)
class AdaptersTest {
  private static final String REFUSED = "{\"error\":{\"code\":\"61003\"}}";

  @TempDir Path folder;

  private final List<String> received = new CopyOnWriteArrayList<>();
  private final List<String> stranger = new CopyOnWriteArrayList<>();
  private WireBroker broker;
  private HttpServer api;
  private HttpServer other;
  private TokenClient client;

  /** What the API answers to each token: a body, or a target of a redirect. */
  private volatile String first = "fine";

  private volatile String second = "fine";

  /** Whether the API's refusals do not say how long they are. */
  private volatile boolean chunked;

  /** Whether the API's refusals end before they are complete. */
  private volatile boolean breaksOff;

  @BeforeEach
  void start() throws IOException {
    api = serve(this::answer);
    other =
        serve(
            exchange -> {
              stranger.add("a request");
              respond(exchange, 200, "stranger");
            });
    broker = new WireBroker();
    broker.apiBaseUrl = url(api) + "/api";
    Path bearer = Files.writeString(folder.resolve("bearer"), "tbk_first");
    client =
        TokenClient.builder(broker.endpoint())
            .bearerFile(bearer)
            .timeout(Duration.ofSeconds(60))
            .build();
  }

  @AfterEach
  void stop() {
    client.close();
    broker.close();
    api.stop(0);
    other.stop(0);
  }

  private static HttpServer serve(com.sun.net.httpserver.HttpHandler handler) throws IOException {
    HttpServer server = HttpServer.create(new InetSocketAddress("127.0.0.1", 0), 0);
    server.createContext("/", handler);
    server.start();
    return server;
  }

  private static String url(HttpServer server) {
    return "http://127.0.0.1:" + server.getAddress().getPort();
  }

  private void answer(HttpExchange exchange) throws IOException {
    String body = new String(exchange.getRequestBody().readAllBytes(), StandardCharsets.UTF_8);
    String authorization = exchange.getRequestHeaders().getFirst("Authorization");
    received.add(authorization + " " + body);
    String answer = "Bearer secret-1".equals(authorization) ? first : second;
    if (answer.startsWith("http://")) {
      exchange.getResponseHeaders().set("Location", answer);
      respond(exchange, 302, "");
    } else if (answer.equals("fine")) {
      respond(exchange, 200, "fine " + body);
    } else {
      refuse(exchange, answer);
    }
  }

  private void refuse(HttpExchange exchange, String answer) throws IOException {
    byte[] bytes = answer.getBytes(StandardCharsets.UTF_8);
    if (breaksOff) {
      exchange.sendResponseHeaders(401, bytes.length + 1);
    } else if (chunked) {
      exchange.sendResponseHeaders(401, 0);
    } else {
      respond(exchange, 401, answer);
      return;
    }
    exchange.getResponseBody().write(bytes);
    exchange.close();
  }

  private static void respond(HttpExchange exchange, int status, String body) throws IOException {
    byte[] bytes = body.getBytes(StandardCharsets.UTF_8);
    exchange.sendResponseHeaders(status, bytes.length == 0 ? -1 : bytes.length);
    exchange.getResponseBody().write(bytes);
    exchange.close();
  }

  private record Answer(int status, String body) {}

  /** The libraries for which there is an adapter. */
  private enum Adapter {
    OKHTTP {
      @Override
      Answer send(TokenClient client, String url, String body, boolean reads) throws IOException {
        OkHttpClient http =
            TokenInterceptor.addTo(new OkHttpClient.Builder(), client, "acme").build();
        RequestBody content = RequestBody.create(body, null);
        try (Response response =
            http.newCall(new Request.Builder().url(url).post(content).build()).execute()) {
          return new Answer(response.code(), reads ? response.body().string() : "");
        } finally {
          http.connectionPool().evictAll();
          http.dispatcher().executorService().shutdown();
        }
      }
    },
    REST_CLIENT {
      @Override
      Answer send(TokenClient client, String url, String body, boolean reads) {
        return RestClient.builder()
            .requestFactory(new JdkClientHttpRequestFactory(HttpClient.newHttpClient()))
            .requestInterceptor(new TokenRequestInterceptor(client, "acme"))
            .build()
            .post()
            .uri(url)
            .body(body)
            .exchange(
                (request, response) ->
                    new Answer(
                        response.getStatusCode().value(),
                        reads
                            ? new String(response.getBody().readAllBytes(), StandardCharsets.UTF_8)
                            : ""));
      }
    },
    WEB_CLIENT {
      @Override
      Answer send(TokenClient client, String url, String body, boolean reads) {
        return WebClient.builder()
            .clientConnector(new JdkClientHttpConnector(HttpClient.newHttpClient()))
            .filter(new TokenExchangeFilter(client, "acme"))
            .build()
            .post()
            .uri(url)
            .bodyValue(body)
            .exchangeToMono(
                response ->
                    (reads ? response.bodyToMono(String.class) : Mono.<String>empty())
                        .defaultIfEmpty("")
                        .map(text -> new Answer(response.statusCode().value(), text)))
            .block();
      }
    };

    Answer post(TokenClient client, String url, String body) throws IOException {
      return send(client, url, body, true);
    }

    abstract Answer send(TokenClient client, String url, String body, boolean reads)
        throws IOException;
  }

  private TokenBrokerException failure(Adapter adapter, String url) {
    Throwable thrown = assertThrows(Exception.class, () -> adapter.post(client, url, "a body"));
    while (!(thrown instanceof TokenBrokerException) && thrown.getCause() != null) {
      thrown = thrown.getCause();
    }
    return (TokenBrokerException) thrown;
  }

  @ParameterizedTest
  @EnumSource
  void a_request_has_the_token(Adapter adapter) throws IOException {
    assertEquals(new Answer(200, "fine a body"), adapter.post(client, url(api), "a body"));
    assertEquals(List.of("Bearer secret-1 a body"), received);
  }

  @ParameterizedTest
  @EnumSource
  void a_refused_token_is_reported_and_the_request_is_sent_again_with_the_next_one(Adapter adapter)
      throws IOException {
    first = REFUSED;
    assertEquals(new Answer(200, "fine a body"), adapter.post(client, url(api), "a body"));
    assertEquals(List.of("Bearer secret-1 a body", "Bearer secret-2 a body"), received);
    assertEquals(1, broker.reports.get());
  }

  @ParameterizedTest
  @EnumSource
  void a_request_is_sent_again_only_once(Adapter adapter) throws IOException {
    first = REFUSED;
    second = REFUSED;
    assertEquals(new Answer(401, REFUSED), adapter.post(client, url(api), "a body"));
    assertEquals(2, received.size());
    assertEquals(1, broker.reports.get());
  }

  @ParameterizedTest
  @EnumSource
  void the_program_gets_other_answers_as_they_are(Adapter adapter) throws IOException {
    for (boolean isChunked : new boolean[] {false, true}) {
      chunked = isChunked;
      for (String body :
          List.of("{\"error\":{\"code\":\"63001\"}}", "no JSON", "", "x".repeat(100_000))) {
        first = body;
        assertEquals(new Answer(401, body), adapter.post(client, url(api), "a body"));
      }
    }
    assertEquals(0, broker.reports.get());
  }

  @ParameterizedTest
  @EnumSource
  void an_answer_whose_body_breaks_off_keeps_its_status(Adapter adapter) throws IOException {
    first = REFUSED;
    breaksOff = true;
    assertEquals(new Answer(401, ""), adapter.send(client, url(api), "a body", false));
    assertThrows(Exception.class, () -> adapter.post(client, url(api), "a body"));
    assertEquals(0, broker.reports.get());
  }

  @Test
  void a_body_without_an_end_is_not_read_to_its_end() {
    AtomicInteger parts = new AtomicInteger();
    Flux<DataBuffer> endless =
        Flux.generate(
            sink -> {
              parts.incrementAndGet();
              sink.next(DefaultDataBufferFactory.sharedInstance.wrap(new byte[1024]));
            });
    ClientResponse response =
        new TokenExchangeFilter(client, "acme")
            .filter(
                ClientRequest.create(HttpMethod.GET, URI.create(url(api))).build(),
                request ->
                    Mono.just(
                        ClientResponse.create(HttpStatusCode.valueOf(500)).body(endless).build()))
            .block();
    assertEquals(500, response.statusCode().value());
    assertTrue(parts.get() < 100, "read " + parts);
    int size =
        response
            .bodyToFlux(DataBuffer.class)
            .map(DataBuffer::readableByteCount)
            .take(200)
            .reduce(0, Integer::sum)
            .block();
    assertEquals(200 * 1024, size);
    assertTrue(parts.get() < 300, "read " + parts);
  }

  @ParameterizedTest
  @EnumSource
  void no_other_host_gets_the_token(Adapter adapter) {
    assertEquals(ErrorKind.WRONG_HOST, failure(adapter, url(other)).kind());
    first = url(other);
    assertEquals(ErrorKind.WRONG_HOST, failure(adapter, url(api)).kind());
    assertTrue(stranger.isEmpty());
  }
}
