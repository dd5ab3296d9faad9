<?php
// Command 1 on a stream that does not block, with a look for an error after each message and a longer one at the end.
// After an error it goes on behind the message that was at fault. See ../contract.py for what it is told and tells.

function connect()
{
    $ctx = stream_context_create();
    stream_context_set_option($ctx, 'ssl', 'local_cert', getenv('LEGACY_PEM'));
    stream_context_set_option($ctx, 'ssl', 'passphrase', getenv('LEGACY_PASSPHRASE'));
    $address = 'ssl://localhost:' . getenv('LEGACY_PORT');
    $fp = stream_socket_client($address, $err, $errstr, 60, STREAM_CLIENT_CONNECT, $ctx);
    if (!$fp) {
        fwrite(STDERR, "Failed to connect: $err $errstr" . PHP_EOL);
        exit(1);
    }
    stream_set_blocking($fp, 0);
    return $fp;
}

function read_error($fp)
{
    $answer = fread($fp, 6);
    return strlen((string) $answer) == 6 ? unpack('Ccommand/Cstatus/Nidentifier', $answer) : null;
}

$messages = array();
foreach (file(getenv('LEGACY_PUSHES'), FILE_IGNORE_NEW_LINES) as $line) {
    $messages[] = explode(' ', $line, 5);
}

$waiting = true;
$next = 0;
$fp = connect();
while (true) {
    $error = null;
    while ($next < count($messages) && $error === null) {
        list($identifier, $expiry, $priority, $token, $payload) = $messages[$next];
        $frame = pack('C', 1) . pack('N', $identifier) . pack('N', $expiry)
            . pack('n', 32) . pack('H*', $token) . pack('n', strlen($payload)) . $payload;
        if (@fwrite($fp, $frame) === strlen($frame)) {
            $next++;
            $error = read_error($fp);
        } else {
            // The gateway is gone, and why is perhaps still to be read.
            $error = read_error($fp) ?: array('status' => -1, 'identifier' => $identifier - 1);
        }
    }
    while ($waiting && $error === null && !feof($fp)) {
        $read = array($fp);
        $none = null;
        stream_select($read, $none, $none, 30);
        $error = read_error($fp);
    }
    fclose($fp);
    if ($error === null) {
        break;
    }
    $waiting = false;
    foreach ($messages as $number => $message) {
        if ($message[0] == $error['identifier']) {
            echo json_encode(array('status' => $error['status'], 'token' => $message[3])), PHP_EOL;
            $next = $number + 1;
        }
    }
    $fp = connect();
}
