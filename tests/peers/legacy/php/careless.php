<?php
// Command 0, three messages a connection, and away: whether anybody wanted to say something is not looked at.
// See ../contract.py for what it is told.

$ctx = stream_context_create();
stream_context_set_option($ctx, 'ssl', 'local_cert', getenv('LEGACY_PEM'));
stream_context_set_option($ctx, 'ssl', 'passphrase', getenv('LEGACY_PASSPHRASE'));

$messages = file(getenv('LEGACY_PUSHES'), FILE_IGNORE_NEW_LINES);
foreach (array_chunk($messages, 3) as $chunk) {
    $fp = stream_socket_client(
        'ssl://localhost:' . getenv('LEGACY_PORT'), $err, $errstr, 60, STREAM_CLIENT_CONNECT, $ctx
    );
    if (!$fp) {
        exit("Failed to connect: $err $errstr" . PHP_EOL);
    }
    foreach ($chunk as $message) {
        list($identifier, $expiry, $priority, $token, $payload) = explode(' ', $message, 5);
        $msg = chr(0) . pack('n', 32) . pack('H*', $token) . pack('n', strlen($payload)) . $payload;
        fwrite($fp, $msg, strlen($msg));
    }
    fclose($fp);
}
